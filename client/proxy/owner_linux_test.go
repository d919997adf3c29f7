package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestOwnerByBothWays(t *testing.T) {
	for _, loopback := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", loopback)
		if err != nil {
			t.Logf("no %s here: %v", loopback, err)
			continue
		}
		defer listener.Close()
		near, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer near.Close()
		far, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		peer, us := far.RemoteAddr().(*net.TCPAddr), far.LocalAddr().(*net.TCPAddr)
		if uid, err := owner(peer, us); err != nil || uid != os.Geteuid() {
			t.Errorf("%s: owner = %d, %v", loopback, uid, err)
		}
		if uid, err := ownerFromProc(peer.AddrPort(), us.AddrPort()); err != nil || uid != os.Geteuid() {
			t.Errorf("%s: owner in /proc = %d, %v", loopback, uid, err)
		}
	}
}

// A socket that its process has closed reads as root's: somebody else could send and close at once, and be root.
func TestClosedConnectionsHaveNoOwner(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	_ = near.Close()
	peer, us := far.RemoteAddr().(*net.TCPAddr), far.LocalAddr().(*net.TCPAddr)
	if uid, err := owner(peer, us); err == nil {
		t.Errorf("owner = %d", uid)
	}
	if uid, err := ownerFromProc(peer.AddrPort(), us.AddrPort()); err == nil {
		t.Errorf("owner in /proc = %d", uid)
	}
}

func TestFindOwner(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:A0F2 0100007F:0438 01 00000000:00000000 00:00000000 00000000  1000        0 81234 1 0000000000000000 20 4 30 10 -1
   1: 0100007F:A0F3 0100007F:0438 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000000000000 20 4 30 10 -1
   short
`
	us := procAddr(netip.MustParseAddrPort("127.0.0.1:1080"))
	for port, want := range map[uint16]int{0xa0f2: 1000, 0xa0f3: -1, 0xa0f4: -1} {
		peer := procAddr(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		got, err := findOwner(strings.NewReader(table), peer, us)
		if got != want || (want < 0) != errors.Is(err, errOwner) {
			t.Errorf("port %x: %d, %v", port, got, err)
		}
	}
}

func TestOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("no curl here")
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	defer web.Close()
	for _, users := range [][]int{{0}, {0, 65534}} {
		r := newRig(t, strings.TrimPrefix(web.URL, "http://"), func(o *Options) { o.Users = users })
		cmd := exec.Command(curl, "-sS", "--max-time", "5", "--proxy", "http://"+r.Addr().String(), "http://10.77.0.5/")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if allowed := slices.Contains(users, 65534); allowed != (err == nil && string(out) == "hello") {
			t.Errorf("users %v: %q, %v", users, out, err)
		}
	}
}
