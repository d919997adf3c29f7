package host

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/culvertnet/culvert/internal/lab"
)

// Three users of a host, of whom the first is one of its services.
const (
	service = 112
	alice   = 3001
	bob     = 3002
)

// rules lists the routing rules of IPv4 that are neither the kernel's own nor anybody else's, as user and table.
func rules(t *testing.T) []int {
	t.Helper()
	list, err := netlink.RuleList(netlink.FAMILY_V4)
	check(t, err)
	var users []int
	for i := range list {
		if user, ok := ours(&list[i]); ok {
			users = append(users, user)
		}
	}
	slices.Sort(users)
	return users
}

// leads tells over which interface a user's packets leave.
func leads(t *testing.T, user int, to string) string {
	t.Helper()
	uid := uint32(user)
	routes, err := netlink.RouteGetWithOptions(net.ParseIP(to), &netlink.RouteGetOptions{UID: &uid})
	check(t, err)
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	check(t, err)
	return link.Attrs().Name
}

// Two users' tunnels on one host that lead to the same places: each user's packets go into their own, whoever was first and however far
// the other's routes reach; root's follow the main table. Rules are there only while there are two, and what a killed client has left is
// gone with the next.
func TestEachUserHasOwnRoutes(t *testing.T) {
	inNamespace(t)
	_, err := open(t, Options{Name: "eth0"}).SetRoutes(prefixes("192.0.2.0/24"), nil)
	check(t, err)
	stale := ruleOf(netlink.FAMILY_V4, 4711)
	check(t, netlink.RuleAdd(stale))
	first := open(t, Options{User: alice})
	setRoutes(t, first, prefixes("10.0.0.0/8", "198.19.0.0/16"), nil)
	if got := rules(t); len(got) > 0 {
		t.Errorf("one user's tunnel alone needs no rules: %v", got)
	}
	second, err := Open(Options{User: bob})
	check(t, err)
	setRoutes(t, second, prefixes("10.20.0.0/16", "198.19.0.0/16"), nil)
	if got := rules(t); !slices.Equal(got, []int{alice, bob}) {
		t.Errorf("rules of two users: %v", got)
	}
	for _, c := range []struct {
		user int
		to   string
		want string
	}{
		{alice, "10.20.0.1", first.Name()}, {alice, "198.19.3.4", first.Name()},
		{bob, "10.20.0.1", second.Name()}, {bob, "198.19.3.4", second.Name()},
		{0, "198.19.3.4", first.Name()}, {0, "10.20.0.1", second.Name()},
	} {
		if got := leads(t, c.user, c.to); got != c.want {
			t.Errorf("user %d gets to %s over %s, want %s", c.user, c.to, got, c.want)
		}
	}
	if shared := second.Shared(); len(shared) > 0 {
		t.Errorf("the second user's tunnel shares %v", shared)
	}
	check(t, second.Close())
	if got := rules(t); len(got) > 0 {
		t.Errorf("rules are left: %v", got)
	}
	if got := leads(t, alice, "198.19.3.4"); got != first.Name() {
		t.Errorf("then the first user gets there over %s", got)
	}
}

// Two tunnels of one user: what both lead to is the first's, and the second knows it.
func TestSharedRoutes(t *testing.T) {
	inNamespace(t)
	first, second := open(t, Options{User: alice}), open(t, Options{User: alice})
	setRoutes(t, first, prefixes("10.1.0.0/16", "198.19.0.0/16"), nil)
	setRoutes(t, second, prefixes("10.2.0.0/16", "198.19.0.0/16"), nil)
	if got := second.Shared(); !slices.Equal(got, prefixes("198.19.0.0/16")) {
		t.Errorf("shared: %v", got)
	}
	check(t, second.Lead(netip.MustParseAddr("198.19.7.7"), netip.MustParseAddr("10.3.0.1")))
	setRoutes(t, second, prefixes("10.2.0.0/16", "198.19.0.0/16"), nil)
	check(t, second.Lead(netip.MustParseAddr("198.19.7.7"), netip.MustParseAddr("198.19.9.9")))
	for to, want := range map[string]string{"198.19.7.7": second.Name(), "198.19.9.9": second.Name(), "198.19.7.8": first.Name(), "10.2.0.1": second.Name()} {
		if got := leads(t, alice, to); got != want {
			t.Errorf("%s is reached over %s, want %s", to, got, want)
		}
	}
	if got := rules(t); len(got) > 0 {
		t.Errorf("one user's tunnels need no rules: %v", got)
	}
}

// send has a user of this host send a datagram, and gives what the kernel says to that.
func send(t *testing.T, user uint32, to string) error {
	t.Helper()
	host, port, err := net.SplitHostPort(to)
	check(t, err)
	cmd := exec.Command("bash", "-c", fmt.Sprintf("exec 3<>/dev/udp/%s/%s && echo one >&3 && sleep 0.1 && echo two >&3", host, port))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, NoSetGroups: true}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// A tunnel that is one user's takes nothing from another, who is told so at once; root and services pass. One that is nobody's takes all.
func TestOtherUsersSendNothing(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{User: alice})
	if i.link.shield == nil {
		lab.Skip(t, "this kernel has no nftables")
	}
	check(t, i.SetAddresses([]netip.Addr{netip.MustParseAddr("198.18.0.5")}))
	setRoutes(t, i, prefixes("10.9.0.0/24"), nil)
	shared := open(t, Options{})
	check(t, shared.SetAddresses([]netip.Addr{netip.MustParseAddr("198.18.0.6")}))
	setRoutes(t, shared, prefixes("10.10.0.0/24"), nil)
	const into, everybody = "10.9.0.1:53", "10.10.0.1:53"
	if err := send(t, alice, everybody); err != nil {
		lab.Skip(t, "there is one user only: %v", err)
	}
	for _, user := range []uint32{0, service, alice} {
		if err := send(t, user, into); err != nil {
			t.Errorf("user %d: %v", user, err)
		}
	}
	if err := send(t, bob, into); err == nil {
		t.Error("another user's datagrams go into the tunnel")
	}
	if err := send(t, bob, everybody); err != nil {
		t.Errorf("into everybody's: %v", err)
	}
}
