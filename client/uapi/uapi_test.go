package uapi

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var key = wire.Key{1, 2, 3}

func state() State {
	return State{Port: 4711, Peers: []tunnel.PeerState{
		{
			Key: key, Endpoint: netip.MustParseAddrPort("[2001:db8::1]:51820"), AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
			Seen: tunnel.Seen{Handshake: time.Unix(12, 34), RxBytes: 5, TxBytes: 6},
		},
		{Key: wire.Key{9}},
	}}
}

// want is what tools get.
var want = fmt.Sprintf(`listen_port=4711
public_key=%s
endpoint=[2001:db8::1]:51820
last_handshake_time_sec=12
last_handshake_time_nsec=34
tx_bytes=6
rx_bytes=5
allowed_ip=10.0.0.0/8
protocol_version=1
public_key=%s
tx_bytes=0
rx_bytes=0
protocol_version=1
errno=0

`, key.Hex(), wire.Key{9}.Hex())

func folder(t *testing.T) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("tools look elsewhere on Windows")
	}
	dir, err := os.MkdirTemp("", "uapi") // a socket's path has to be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "wireguard")
}

func ask(t *testing.T, path, request string) string {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	var answer strings.Builder
	for in := bufio.NewReader(conn); ; {
		line, err := in.ReadString('\n')
		if err != nil {
			return answer.String()
		}
		if answer.WriteString(line); line == "\n" {
			return answer.String()
		}
	}
}

func TestToolsSeeAndChangeNothing(t *testing.T) {
	dir := folder(t)
	s, err := Listen(Options{Dir: dir, Name: "culvert7", State: state})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "culvert7.sock")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v; only its owner may open it", info, err)
	}
	if got := ask(t, path, "get=1\n\n"); got != want {
		t.Errorf("got\n%s", got)
	}
	for _, order := range []string{
		"set=1\nprivate_key=" + key.Hex() + "\n\n", "set=1\nreplace_peers=true\n\n", "set=1\nlisten_port=1\n\n", "get=2\n\n", "\n", "get=1\x00\n\n",
	} {
		if got := ask(t, path, order); got != fmt.Sprintf("errno=%d\n\n", refused) {
			t.Errorf("%q: got %q", order, got)
		}
	}
	if got := ask(t, path, strings.Repeat("x", maxRequest+1)+"\n\n"); got != "" {
		t.Errorf("a request without end: got %q", got)
	}
	if _, err := Listen(Options{Dir: dir, Name: "culvert7", State: state}); err == nil {
		t.Error("a second tunnel took the first one's socket")
	}
	if got := ask(t, path, "get=1\n\n"); got != want {
		t.Errorf("after that, got\n%s", got)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}

// What a killed tunnel has left is removed by the next one; what lives, and what is not ours, stays.
func TestDeadSocketsAreRemoved(t *testing.T) {
	dir := folder(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	leave := func(name string, dead bool) {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name+suffix), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		if l.SetUnlinkOnClose(false); dead {
			l.Close()
			return
		}
		t.Cleanup(func() { l.Close() })
	}
	leave("culvert998", true)
	leave("culvert999", true)
	leave("culvert997", false)
	leave("wg0", true)
	s, err := Listen(Options{Dir: dir, Name: "culvert999", State: state})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "culvert997.sock culvert999.sock wg0.sock" {
		t.Errorf("left are %s", got)
	}
}

// A folder that only a killed tunnel had used goes with the next one, and another's stays.
func TestFolderOfADeadTunnel(t *testing.T) {
	for name, stays := range map[string]bool{"culvert998": false, "wg0": true} {
		dir := folder(t)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name+suffix), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		s, err := Listen(Options{Dir: dir, Name: "culvert999", State: state})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); os.IsNotExist(err) == stays {
			t.Errorf("%s: the folder is %v", name, err)
		}
	}
}

func TestSweepTakesTheFolderAlong(t *testing.T) {
	dir := folder(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	Sweep(dir)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a folder in which nothing was left: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "culvert998"+suffix), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	Sweep(dir)
	if got := len(glob(t, dir)); got != 1 {
		t.Errorf("%d sockets after a sweep while one is in use", got)
	}
	l.Close()
	Sweep(dir)
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}

func glob(t *testing.T, dir string) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"no name": {State: state}, "a path": {Name: "../x", State: state}, "nothing to show": {Name: "culvert0"},
	} {
		if _, err := Listen(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzRequest(f *testing.F) {
	f.Add("get=1\n\n")
	f.Add("set=1\nprivate_key=00\n\nget=1\n\n")
	f.Add("\n\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		s := &Server{opts: Options{State: state}}
		var out strings.Builder
		s.serve(struct {
			io.Reader
			io.Writer
		}{strings.NewReader(text), &out})
		rest := strings.ReplaceAll(strings.ReplaceAll(out.String(), want, ""), fmt.Sprintf("errno=%d\n\n", refused), "")
		if rest != "" {
			t.Errorf("%q was answered with %q", text, rest)
		}
	})
}
