//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second // for what will come

func TestMain(m *testing.M) {
	if os.Getenv("LAB_TEST_CHILD") != "" {
		child(os.Getenv("LAB_TEST_CHILD"))
		return
	}
	_ = Enter() // each test names the reason, through Require
	goleak.VerifyTestMain(m)
}

// build gives a lab with two hosts on the internet that answer on UDP port 7 with the address they see.
func build(t *testing.T) (*Net, [2]netip.AddrPort) {
	t.Helper()
	n := empty(t)
	var mirrors [2]netip.AddrPort
	for i := range mirrors {
		h := must(n.Host(fmt.Sprintf("mirror-%d", i), HostOptions{}))(t)
		mirrors[i] = mirror(t, h, ":7")
	}
	return n, mirrors
}

// empty gives a lab with nothing attached, which ends with the test.
func empty(t *testing.T) *Net {
	t.Helper()
	Require(t)
	n := must(New(context.Background()))(t)
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func mirror(t *testing.T, h *Host, port string) netip.AddrPort {
	t.Helper()
	at, stop, err := h.ServeMirror(port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return netip.AddrPortFrom(h.Addr(), at.Port())
}

// must unpacks a result for a test that cannot go on without it.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func open(t *testing.T, h *Host) net.PacketConn {
	t.Helper()
	conn := must(h.ListenPacket(":0"))(t)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestPrivateIsPrivate(t *testing.T) {
	n, _ := build(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	a := must(n.Host("a", HostOptions{Behind: nat}))(t)
	b := must(n.Host("b", HostOptions{Behind: nat}))(t)
	stranger := must(n.Host("stranger", HostOptions{}))(t)
	l := must(a.Listen(":80"))(t)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	at := netip.AddrPortFrom(a.Addr(), 80).String()
	if conn, err := stranger.Dial(ctx, "tcp", at); err == nil {
		conn.Close()
		t.Error("a private address is reachable from the internet")
	}
	conn, err := b.Dial(ctx, "tcp", at)
	if err != nil {
		t.Fatalf("neighbours cannot speak: %v", err)
	}
	if got := conn.RemoteAddr().String(); got != at {
		t.Errorf("connected to %s, want %s", got, at)
	}
	conn.Close()
	if !nat.LAN().Contains(a.Addr()) || !nat.LAN().Contains(b.Addr()) {
		t.Errorf("%v does not hold %v and %v", nat.LAN(), a.Addr(), b.Addr())
	}
}

func TestDelayIsNominal(t *testing.T) {
	Require(t)
	for _, delay := range []time.Duration{time.Nanosecond, 5 * time.Millisecond, 20 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			n, mirrors := build(t)
			host := must(n.Host("far", HostOptions{Link: Link{Delay: delay}}))(t)
			conn := open(t, host)
			var rtts []time.Duration
			for range 25 {
				start := time.Now()
				must(Mapped(conn, mirrors[0], patience))(t)
				rtts = append(rtts, time.Since(start))
			}
			// A busy machine adds to some of them, and takes from none.
			if got, want := slices.Min(rtts), 2*delay; got < want || got > want+2*time.Millisecond {
				t.Errorf("the shortest RTT is %v, want %v to 2 ms more; all: %v", got, want, rtts)
			}
		})
	}
}

func TestLossIsNominal(t *testing.T) {
	n, mirrors := build(t)
	host := must(n.Host("lossy", HostOptions{Link: Link{Loss: 0.1}}))(t)
	// Both ways: 0.9 × 0.9 = 0.81, and six standard deviations of a binomial distribution. A busy machine loses more, because
	// sockets overflow that nobody reads in time; so it may try again.
	const least, most = 0.757, 0.863
	for range 5 {
		share := survivors(t, open(t, host), mirrors[0])
		if share > most {
			t.Fatalf("%.3f of round trips survive 10 %% loss each way, want 0.81", share)
		}
		if share >= least {
			return
		}
		t.Logf("%.3f survived", share)
	}
	t.Error("too many are lost, each time")
}

// survivors gives the share of questions that are answered.
func survivors(t *testing.T, conn net.PacketConn, server netip.AddrPort) float64 {
	const sent = 2000
	var sender sync.WaitGroup
	sender.Go(func() {
		for range sent {
			_, _ = conn.WriteTo([]byte("?"), net.UDPAddrFromAddrPort(server))
			time.Sleep(20 * time.Microsecond)
		}
	})
	defer sender.Wait()
	got := 0
	buf := make([]byte, 64)
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	for got < sent {
		if _, _, err := conn.ReadFrom(buf); err != nil {
			break
		}
		got++
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	}
	return float64(got) / sent
}

// TestLossTakesSinglePackets sends runs that the kernel is to cut into datagrams: a wire loses packets, and not runs.
func TestLossTakesSinglePackets(t *testing.T) {
	n := empty(t)
	lossy := must(n.Host("lossy", HostOptions{Link: Link{Loss: 0.2}}))(t)
	sink := must(n.Host("sink", HostOptions{}))(t)
	in := must(sink.ListenPacket(":7"))(t)
	defer in.Close()
	out := open(t, lossy).(*net.UDPConn)
	raw := must(out.SyscallConn())(t)
	const runs, datagrams, size = 20, 40, 1000
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = syscall.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size)
	}); err != nil || failed != nil {
		Skip(t, "this kernel does not segment datagrams: %v, %v", err, failed)
	}
	for run := range byte(runs) {
		if _, err := out.WriteTo(bytes.Repeat([]byte{run}, datagrams*size), &net.UDPAddr{IP: sink.Addr().AsSlice(), Port: 7}); err != nil {
			t.Fatal(err)
		}
	}
	var came [runs]int
	buf := make([]byte, 2*size)
	for _ = in.SetReadDeadline(time.Now().Add(patience)); ; _ = in.SetReadDeadline(time.Now().Add(time.Second)) {
		if _, _, err := in.ReadFrom(buf); err != nil {
			break
		}
		came[buf[0]]++
	}
	// A whole run comes through with a probability of 0.0001, and is lost whole with one of 10⁻²⁸.
	if i := slices.IndexFunc(came[:], func(n int) bool { return n > 0 && n < datagrams }); i < 0 {
		t.Errorf("of runs of %d datagrams came %v", datagrams, came)
	}
}

// TestConnectionsUseTheCommonCongestionControl asks a connection on each side.
func TestConnectionsUseTheCommonCongestionControl(t *testing.T) {
	n := empty(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	near := must(n.Host("near", HostOptions{Behind: nat}))(t)
	far := must(n.Host("far", HostOptions{}))(t)
	l := must(far.Listen(":80"))(t)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	from := must(near.Dial(ctx, "tcp", netip.AddrPortFrom(far.Addr(), 80).String()))(t)
	defer from.Close()
	to := must(l.Accept())(t)
	defer to.Close()
	for i, c := range []net.Conn{from, to} {
		raw := must(c.(*net.TCPConn).SyscallConn())(t)
		var got string
		var failed error
		if err := raw.Control(func(fd uintptr) {
			got, failed = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		}); err != nil || failed != nil {
			t.Fatal(err, failed)
		}
		if got != congestion {
			t.Errorf("side %d uses %q, want %q", i, got, congestion)
		}
	}
}

// child is what this test binary does as a program on a host.
func child(role string) {
	switch role {
	case "who":
		caps := "?"
		data, _ := os.ReadFile("/proc/self/status")
		for line := range strings.Lines(string(data)) {
			if rest, ok := strings.CutPrefix(line, "CapEff:"); ok {
				caps = strings.TrimSpace(rest)
			}
		}
		l, err := net.Listen("tcp", ":80")
		fmt.Printf("uid %d caps %s low port %v\n", os.Getuid(), caps, err == nil)
		if l != nil {
			l.Close()
		}
		os.Exit(7)
	case "daemon": // leaves a child of its own in another session
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"LAB_TEST_CHILD=sleep"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			os.Exit(1)
		}
		fmt.Println(cmd.Process.Pid)
	case "sleep":
		time.Sleep(time.Minute)
	}
}

func run(t *testing.T, h *Host, role string, p Program) (string, int) {
	t.Helper()
	var out bytes.Buffer
	p.Path, p.Env, p.Stdout, p.Stderr = "/proc/self/exe", []string{"LAB_TEST_CHILD=" + role}, &out, &out
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	code, err := h.Run(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String()), code
}

func TestProgramsRunAsTheyAreTold(t *testing.T) {
	n, _ := build(t)
	h := must(n.Host("h", HostOptions{}))(t)
	out, code := run(t, h, "who", Program{})
	if code != 7 || !strings.HasPrefix(out, "uid 0 ") || !strings.HasSuffix(out, "low port true") {
		t.Errorf("as root: exit %d, %q", code, out)
	}
	want := fmt.Sprintf("uid %d caps 0000000000000000 low port false", UnprivilegedID)
	if out, code = run(t, h, "who", Program{Unprivileged: true}); code != 7 || out != want {
		t.Errorf("unprivileged: exit %d, %q, want %q", code, out, want)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	Require(t)
	n := must(New(t.Context()))(t)
	h := must(n.Host("h", HostOptions{}))(t)
	out, _ := run(t, h, "daemon", Program{})
	var stray int
	if _, err := fmt.Sscan(out, &stray); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	proc, err := h.Start(Program{Path: "/proc/self/exe", Env: []string{"LAB_TEST_CHILD=sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // idempotent
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range []int{stray, proc.Pid()} {
		if alive(pid) {
			t.Errorf("process %d outlived the lab", pid)
		}
	}
	if _, err := h.Start(Program{Path: "/proc/self/exe"}); err == nil {
		t.Error("a closed lab starts programs")
	}
}

// alive reports whether a process runs: there, and not a zombie that its new parent has yet to collect.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(data, []byte(") Z "))
}

func TestWaitEndsWithItsContext(t *testing.T) {
	n, _ := build(t)
	h := must(n.Host("h", HostOptions{}))(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := h.Run(ctx, Program{Path: "/proc/self/exe", Env: []string{"LAB_TEST_CHILD=sleep"}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestSnapshotSeesWhatIsLeft(t *testing.T) {
	n, _ := build(t)
	h := must(n.Host("h", HostOptions{}))(t)
	before := must(h.Snapshot())(t)
	l := must(h.Listen(":8080"))(t)
	if err := h.AddAddr(netip.MustParseAddr("10.99.0.1")); err != nil {
		t.Fatal(err)
	}
	diff := cmp.Diff(before, must(h.Snapshot())(t))
	for _, want := range []string{"socket tcp6", "addr lo 10.99.0.1/32", "10.99.0.1"} {
		if !strings.Contains(diff, want) {
			t.Errorf("the difference lacks %q:\n%s", want, diff)
		}
	}
	l.Close()
}

func TestHostRefusesNonsense(t *testing.T) {
	n, _ := build(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	if _, err := n.Host("h", HostOptions{Behind: nat, Link: Link{Delay: 1}}); err == nil {
		t.Error("a host behind a NAT got a link of its own")
	}
	h := must(n.Host("h", HostOptions{}))(t)
	if _, err := h.Dial(t.Context(), "tcp", "localhost:80"); err == nil {
		t.Error("a name was resolved outside the host")
	}
}

func TestFlatLabRunsOnLoopback(t *testing.T) {
	n := Flat(t.Context())
	a := must(n.Host("a", HostOptions{}))(t)
	b := must(n.Host("b", HostOptions{}))(t)
	if !n.Flat() || !a.Addr().IsLoopback() || a.Addr() == b.Addr() {
		t.Fatalf("flat %v, hosts at %v and %v", n.Flat(), a.Addr(), b.Addr())
	}
	at, stop, err := a.ServeMirror(netip.AddrPortFrom(a.Addr(), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	conn := must(b.ListenPacket(netip.AddrPortFrom(b.Addr(), 0).String()))(t)
	defer conn.Close()
	if seen := must(Mapped(conn, at, patience))(t); seen.Addr() != b.Addr() {
		t.Errorf("b appears as %v, want %v", seen, b.Addr())
	}
	if _, code := run(t, a, "who", Program{}); code != 7 {
		t.Errorf("exit %d, want 7", code)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Host("c", HostOptions{}); err != nil {
		t.Fatal(err) // an address costs nothing; only programs are refused
	}
}
