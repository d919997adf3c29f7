package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// nobodyEnv makes this program open a device as the user that it is started as, and say how that went.
const nobodyEnv = "CULVERT_KERNEL_TEST_NOBODY"

func TestMain(m *testing.M) {
	if os.Getenv(nobodyEnv) != "" {
		_, err := Open(Options{})
		fmt.Println(problem.CodeOf(err), "|", problem.From(err).Next)
		return
	}
	goleak.VerifyTestMain(m)
}

func links(t *testing.T) (names []string) {
	t.Helper()
	list, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names
}

// device gives one, or nil where the kernel has no WireGuard or we have no right to it: then a refusal that says what to do is what is
// wanted, and nothing left behind. `make kernel` runs these tests where it has.
func device(t *testing.T) *Device {
	t.Helper()
	before := links(t)
	d, err := Open(Options{})
	if err == nil {
		t.Cleanup(func() { _ = d.Close() })
		return d
	}
	p := problem.From(err)
	if p.Code != problem.Unsupported && p.Code != problem.NeedsPrivilege || !strings.Contains(p.Next, "--mode") {
		t.Fatalf("refused with %v, next %q", err, p.Next)
	}
	if now := links(t); !slices.Equal(now, before) {
		t.Fatalf("before there were %v, now %v", before, now)
	}
	t.Logf("refused: %v", err)
	return nil
}

func TestRefusalSaysWhatToDo(t *testing.T) {
	if d := device(t); d != nil && d.Close() != nil {
		t.Error("a new device cannot be closed")
	}
}

func TestOrdinaryUserIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		device(t)
		return
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "kernel")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program := dir + "/test"
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Dir, cmd.Env = "/", []string{nobodyEnv + "=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), string(problem.NeedsPrivilege)+" |") || !strings.Contains(string(out), "--mode proxy") {
		t.Errorf("got %q, %v", out, err)
	}
}

// inside lists the destinations of the routes in the device's namespace.
func (d *Device) inside(t *testing.T) (list []string) {
	t.Helper()
	routes, err := d.ns.handle.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Dst != nil && (r.LinkIndex == d.near.Attrs().Index || r.LinkIndex == d.wg.Attrs().Index) {
			list = append(list, r.Dst.String())
		}
	}
	slices.Sort(list)
	return list
}

func TestDevice(t *testing.T) {
	before := links(t)
	d := device(t)
	if d == nil {
		return
	}
	d.hidden(t)
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.SetKey(key); err != nil {
		t.Fatal(err)
	}
	addrs := []netip.Addr{netip.MustParseAddr("198.18.0.9"), netip.MustParseAddr("fd63::9")}
	want := []string{"0.0.0.0/0", "198.18.0.9/32", "::/0", "fd63::9/128"}
	if err := d.SetAddresses(addrs); err != nil {
		t.Fatal(err)
	}
	if got := d.inside(t); !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v", got, want)
	}
	for _, mtu := range []int{1200, 1420} { // below 1280 there is no IPv6
		if err := d.SetMTU(mtu); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.SetAddresses(addrs); err != nil {
		t.Fatal(err)
	}
	if got := d.inside(t); !slices.Equal(got, want) {
		t.Errorf("after a small MTU, routes %v, want %v", got, want)
	}
	d.peers(t)
	other := device(t)
	if other.Name() == d.Name() {
		t.Errorf("two devices are called %s", d.Name())
	}
	for _, one := range []*Device{d, other, d} {
		if err := one.Close(); err != nil {
			t.Error(err)
		}
	}
	if now := links(t); !slices.Equal(now, before) {
		t.Errorf("before there were %v, now %v", before, now)
	}
	if err := d.SetKey(key); err == nil {
		t.Error("a closed device takes a key")
	}
	if _, err := d.Listen(t.Context()); err == nil {
		t.Error("a closed device opens a socket")
	}
}

// hidden wants the device's port and interface to be nowhere on the host: nobody can send it anything, or ask it for its key.
func (d *Device) hidden(t *testing.T) {
	t.Helper()
	for _, network := range []string{"udp4", "udp6"} {
		c, err := net.ListenPacket(network, fmt.Sprintf(":%d", port))
		if err != nil {
			t.Errorf("the device's port is the host's as well: %v", err)
			continue
		}
		c.Close()
	}
	host, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if list, err := host.Devices(); err != nil || len(list) != 0 {
		t.Errorf("the host sees %d devices, %v", len(list), err)
	}
}

// peers adds two peers and has the second take over what the first may be sent; then a handshake leaves at once.
func (d *Device) peers(t *testing.T) {
	t.Helper()
	c, err := d.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	allowed := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/16")}
	var keys [2]wire.Key
	for i := range keys {
		private, _ := wire.NewPrivateKey()
		keys[i] = private.Public()
		if err := d.AddPeer(keys[i], c.LocalAddr(), nil); err != nil {
			t.Fatal(err)
		}
		if err := d.SetAllowedIPs(keys[i], allowed); err != nil {
			t.Fatal(err)
		}
	}
	state, err := d.client.Device(wgName)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range state.Peers {
		if has := len(p.AllowedIPs); (p.PublicKey == [32]byte(keys[1])) != (has == len(allowed)) || p.PublicKey == [32]byte(keys[0]) && has != 0 {
			t.Errorf("peer %s has %d allowed ips", p.PublicKey, has)
		}
	}
	if err := d.Shake(keys[1]); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	n, from, err := c.ReadFrom(buf)
	if err != nil || from != d.Addr() || n != 148 || buf[0] != 1 {
		t.Errorf("the device sends %d bytes of type %d from %v, %v; want an initiation from %v", n, buf[0], from, err, d.Addr())
	}
	if seen, err := d.Seen(keys[1]); err != nil || !seen.Handshake.IsZero() || seen.TxBytes < 148 {
		t.Errorf("seen %+v, %v", seen, err)
	}
	if err := d.RemovePeer(keys[1]); err != nil {
		t.Error(err)
	}
	if _, err := d.Seen(keys[1]); err == nil {
		t.Error("a removed peer is seen")
	}
}

// A thread that cannot come back is nobody else's, and whoever was on it hears of that.
func TestThreadThatCannotReturn(t *testing.T) {
	ns, err := newNamespace()
	if errors.Is(err, unix.EPERM) {
		lab.Skip(t, "needs root, to make a network namespace")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer ns.close()
	host, err := os.Readlink(threadNamespace)
	if err != nil {
		t.Fatal(err)
	}
	result, release := make(chan error), make(chan struct{})
	defer close(release)
	var lose func()
	lose = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // the process is looked up by its first thread: that one stays
			go lose()
			<-release
			runtime.UnlockOSThread()
			return
		}
		result <- ns.do(func() error { // capabilities are a thread's own
			header, none := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
			return unix.Capset(&header, &none[0])
		})
	}
	go lose()
	if err := <-result; !errors.Is(err, unix.EPERM) {
		t.Errorf("a thread that is left abroad: %v", err)
	}
	for range 20 {
		at := make(chan string)
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			name, _ := os.Readlink(threadNamespace)
			at <- name
		}()
		if name := <-at; name != host {
			t.Fatalf("another goroutine is in %s, not %s", name, host)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, mtu := range []int{1, 1279, 65536} {
		if _, err := Open(Options{MTU: mtu}); problem.CodeOf(err) != problem.Usage {
			t.Errorf("an MTU of %d: %v", mtu, err)
		}
	}
}
