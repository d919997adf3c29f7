//go:build !linux

package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// folder is where a user's sockets lie. It is not under TMPDIR, which differs between a user's own processes.
func folder(uid int) string {
	if runtime.GOOS == "windows" {
		if dir, err := os.UserCacheDir(); err == nil {
			return filepath.Join(dir, "culvert")
		}
		return filepath.Join(os.TempDir(), "culvert")
	}
	return fmt.Sprintf("/tmp/culvert-%d", uid)
}

func address(name string, uid int) string { return filepath.Join(folder(uid), name+".sock") }

// sockets lists the names of tunnels whose sockets are users'. One whose process was killed does not answer.
func sockets(users []int) []string {
	var names []string
	for _, uid := range users {
		paths, _ := filepath.Glob(filepath.Join(folder(uid), "*.sock")) // a bad pattern has no match
		for _, path := range paths {
			names = append(names, strings.TrimSuffix(filepath.Base(path), ".sock"))
		}
	}
	return names
}

func listen(name string) (net.Listener, error) {
	uid := os.Geteuid()
	if err := private(folder(uid), uid); err != nil {
		return nil, err
	}
	path := address(name, uid)
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = conn.Close()
		return nil, syscall.EADDRINUSE
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove what a killed process left: %w", err)
	}
	return net.Listen("unix", path)
}

// private makes sure that dir is a folder of ours that nobody else may enter.
func private(dir string, uid int) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the folder of control sockets: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("look at the folder of control sockets: %w", err)
	}
	if !info.IsDir() || !ownedAndPrivate(info, uid) {
		return fmt.Errorf("%s is not a folder that only its user may enter", dir)
	}
	return nil
}
