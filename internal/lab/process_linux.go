package lab

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dieWithThread has a program killed when the thread that started it ends.
func dieWithThread(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }

// dropPrivileges makes a program run as an ordinary user. Where this process has only one user id itself (inside
// [Enter]), a nested user namespace gives it another, whose capabilities reach no network namespace of the lab.
func dropPrivileges(attr *syscall.SysProcAttr, flat bool) {
	if flat && os.Getuid() != 0 {
		return // an ordinary user already
	}
	attr.Credential = &syscall.Credential{Uid: UnprivilegedID, Gid: UnprivilegedID}
	if mapped("/proc/self/uid_map", UnprivilegedID) {
		return
	}
	attr.Credential.NoSetGroups = true
	attr.Cloneflags = syscall.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: UnprivilegedID, HostID: os.Getuid(), Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: UnprivilegedID, HostID: os.Getgid(), Size: 1}}
}

// mapped reports whether id exists in the user namespace whose map this file is (user_namespaces(7)).
func mapped(file string, id uint64) bool {
	data, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(f[0], 10, 64)
		size, err2 := strconv.ParseUint(f[2], 10, 64)
		if err1 == nil && err2 == nil && id >= first && id-first < size {
			return true
		}
	}
	return false
}

// killStrays kills what still runs in the namespaces: programs that left the group they were started in, as a daemon does.
// Nothing but this lab's programs can be there.
func killStrays(spaces []*namespace) error {
	inodes := map[uint64]bool{}
	for _, ns := range spaces {
		inodes[ns.inode] = true
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids := inside(inodes)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v of the lab do not end", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// inside lists the processes whose main thread is in one of the network namespaces.
func inside(inodes map[uint64]bool) []int {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st unix.Stat_t
		if unix.Stat("/proc/"+d.Name()+"/ns/net", &st) == nil && inodes[st.Ino] {
			pids = append(pids, pid)
		}
	}
	return pids
}
