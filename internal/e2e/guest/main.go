//go:build linux

// Command guest is the only program of a virtual machine in which tests run the client on a kernel of its own: it loads modules,
// configures the network as the kernel's command line says, and does what the test asks for over HTTP.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // the machine is started with -no-reboot
}

func run() error {
	for _, m := range [][3]string{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/run", "tmpfs"}, {"tmpfs", "/tmp", "tmpfs"},
	} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	_ = os.MkdirAll("/var", 0o755)
	_ = os.Symlink("/run", "/var/run")
	if err := modules(); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	if err := errors.Join(disk(), begin()); err != nil {
		return err
	}
	return serve()
}

// disk mounts the machine's disk, if it has one, where the kernel's command line says: guest.disk=DEVICE:FOLDER.
func disk() error {
	device, at, ok := strings.Cut(option("guest.disk"), ":")
	if !ok {
		return nil
	}
	for range 200 { // the driver finds it a while after it was loaded
		if _, err := os.Stat(device); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, at, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return nil
}

// begin starts the programs of the file /begin, if there is one: path and arguments are lines, variables of the environment may stand before them, and an empty
// line is between programs. None is started again: that it ends is for the test to see.
func begin() error {
	text, err := os.ReadFile("/begin")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for program := range strings.SplitSeq(strings.TrimSpace(string(text)), "\n\n") {
		if err := start(strings.Split(program, "\n")); err != nil {
			return err
		}
	}
	return nil
}

func start(words []string) error {
	env := []string{"PATH=/bin", "HOME=/tmp"}
	for len(words) > 1 && !strings.HasPrefix(words[0], "/") {
		env, words = append(env, words[0]), words[1:]
	}
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { // ends with the machine
		fmt.Println("guest:", words[0], "ended:", cmd.Wait())
	}()
	return nil
}

// modules loads what the image has, in the order of its list.
func modules() error {
	list, err := os.Open("/modules")
	if err != nil {
		return err
	}
	defer list.Close()
	for sc := bufio.NewScanner(list); sc.Scan(); {
		f, err := os.Open(filepath.Join("/lib/modules", sc.Text()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			fmt.Println("module", sc.Text(), err) // one for a CPU of another make
		}
	}
	return nil
}

// option reads an option of the kernel's command line.
func option(name string) string {
	line, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(line)) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			return value
		}
	}
	return ""
}

func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(option("guest.addr"))
	if err != nil {
		return err
	}
	via, err := netip.ParseAddr(option("guest.via"))
	if err != nil {
		return err
	}
	_ = netlink.LinkSetIP6AddrGenMode(eth, 1) // no link-local address, which would come a while later
	return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(eth, addr), netlink.LinkSetUp(eth),
		netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: via.AsSlice()}))
}

func serve() error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /run", answer(runProgram))
	mux.HandleFunc("POST /fetch", answer(fetch))
	mux.HandleFunc("POST /hold", answer(hold))
	mux.HandleFunc("POST /held", answer(held))
	mux.HandleFunc("POST /kill", answer(kill))
	mux.HandleFunc("POST /memory", answer(memory))
	mux.HandleFunc("POST /state", answer(state))
	fmt.Println("guest: ready")
	return http.ListenAndServe(":8080", mux)
}

// answer serves a function of JSON to JSON.
func answer[In, Out any](f func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		out, err := f(r.Context(), in)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(out)
	}
}

type program struct {
	Path string
	Args []string
	Env  []string
}

type result struct {
	Code           int
	Stdout, Stderr string
}

// runProgram gives the program files for its output: what it leaves running may hold them.
func runProgram(ctx context.Context, p program) (result, error) {
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp("/tmp", "out-")
		if err != nil {
			return result{}, err
		}
		defer os.Remove(f.Name())
		defer f.Close()
		files[i] = f
	}
	cmd := exec.CommandContext(ctx, p.Path, p.Args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = p.Env, files[0], files[1]
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		return result{}, err
	}
	out, _ := os.ReadFile(files[0].Name())
	errs, _ := os.ReadFile(files[1].Name())
	return result{cmd.ProcessState.ExitCode(), string(out), string(errs)}, nil
}

type fetching struct {
	URL   string
	Limit int64 // bytes to read
	Send  int   // bytes of zeros to send, if any
}

type fetched struct {
	Bytes int64
	Sum   string // SHA-256 of what was read, in hexadecimal
	Text  string // the beginning
}

func fetch(ctx context.Context, f fetching) (fetched, error) {
	method := http.MethodGet
	var body io.Reader
	if f.Send > 0 {
		method, body = http.MethodPost, bytes.NewReader(make([]byte, f.Send))
	}
	req, err := http.NewRequestWithContext(ctx, method, f.URL, body)
	if err != nil {
		return fetched{}, err
	}
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return fetched{}, err
	}
	defer resp.Body.Close()
	sum, text := sha256.New(), &bytes.Buffer{}
	n, err := io.Copy(sum, io.TeeReader(io.LimitReader(resp.Body, f.Limit), &head{text}))
	return fetched{n, hex.EncodeToString(sum.Sum(nil)), text.String()}, err
}

// head keeps the first bytes.
type head struct{ *bytes.Buffer }

func (h *head) Write(p []byte) (int, error) {
	if room := 256 - h.Len(); room > 0 {
		h.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// holding is a connection that is held open.
var holding struct {
	sync.Mutex
	conn  net.Conn
	bytes int
	err   string
}

type target struct{ Addr string }

// hold opens a connection to an HTTP server and counts what comes over it.
func hold(ctx context.Context, t target) (struct{}, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.Addr)
	if err != nil {
		return struct{}{}, err
	}
	_, err = fmt.Fprintf(conn, "GET /drip HTTP/1.1\r\nHost: %s\r\n\r\n", t.Addr)
	holding.conn = conn
	go func() { // ends with the machine
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			holding.Lock()
			if holding.bytes += n; err != nil {
				holding.err = err.Error()
				holding.Unlock()
				return
			}
			holding.Unlock()
		}
	}()
	return struct{}{}, err
}

type holdings struct {
	Bytes int
	Err   string
}

func held(context.Context, struct{}) (holdings, error) {
	holding.Lock()
	defer holding.Unlock()
	return holdings{holding.bytes, holding.err}, nil
}

type victim struct{ PID int }

func kill(_ context.Context, v victim) (struct{}, error) {
	return struct{}{}, syscall.Kill(v.PID, syscall.SIGKILL)
}

// memory is what of a process is resident, in bytes.
func memory(_ context.Context, v victim) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", v.PID))
	if err != nil {
		return 0, err
	}
	var size, resident int
	_, err = fmt.Sscan(string(text), &size, &resident)
	return resident * os.Getpagesize(), err
}

// state lists what the machine's kernel holds, one a line, and the files that programs have left in /run.
func state(context.Context, struct{}) ([]string, error) {
	var lines []string
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		lines = append(lines, "link "+l.Attrs().Name+" "+l.Type())
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			lines = append(lines, "addr "+l.Attrs().Name+" "+a.IPNet.String())
		}
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.IP.IsMulticast() && r.LinkIndex == eth.Attrs().Index {
			continue // comes a while after the start
		}
		lines = append(lines, "route "+r.String())
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, p := range procs {
		if exe, err := os.Readlink(p); err == nil && p != "/proc/1/exe" {
			lines = append(lines, "process "+exe)
		}
	}
	err = filepath.WalkDir("/run", func(path string, _ os.DirEntry, err error) error {
		lines = append(lines, "file "+path)
		return err
	})
	slices.Sort(lines)
	return lines, err
}
