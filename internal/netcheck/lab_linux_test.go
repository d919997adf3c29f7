package netcheck

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// childEnv holds the coordinator's URL where this test binary is a host of the lab that checks its network.
const childEnv = "NETCHECK_TEST_CHILD"

// labTimeout is how long a child waits for UDP: long, because a busy machine is slow, and spent whole where nothing comes.
const labTimeout = 10 * time.Second

func TestMain(m *testing.M) {
	if url := os.Getenv(childEnv); url != "" {
		os.Exit(child(url))
	}
	_ = lab.Enter() // a test that needs it names the reason, through lab.Require
	if lo, err := netlink.LinkByName("lo"); err == nil {
		_ = netlink.LinkSetUp(lo) // it is down inside; a test that needs it says so
	}
	_ = flag.Set("test.parallel", "8") // however few processors there are: what is parallel here mostly waits
	goleak.VerifyTestMain(m)
}

func child(url string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := Run(ctx, Options{Coordinator: url, InsecureHTTP: true, UDPTimeout: labTimeout})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_ = json.NewEncoder(os.Stdout).Encode(r)
	return 0
}

// cloud is a coordinator and a second relay on a lab's internet.
type cloud struct {
	net *lab.Net
	url string
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	lab.Require(t)
	n, err := lab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	home, far := serveRelay(t, n, "coordinator", ":443"), serveRelay(t, n, "relay", ":443")
	info := wire.Info{Version: wire.Version, STUN: []string{":3478", ":3479"}, Relays: []wire.Relay{
		{Name: "coordinator", UDP: ":3478", URL: home.url + wire.PathRelay},
		{Name: "far", UDP: netip.AddrPortFrom(far.host.Addr(), 3478).String(), URL: far.url + wire.PathRelay},
	}}
	home.mux.HandleFunc("GET "+wire.PathInfo, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(info) })
	if six := home.host.Addr6(); six.IsValid() {
		info.STUN = append(info.STUN, netip.AddrPortFrom(six, 3478).String())
	}
	return &cloud{net: n, url: home.url}
}

type relayHost struct {
	host *lab.Host
	url  string
	mux  *http.ServeMux
}

func serveRelay(t *testing.T, n *lab.Net, name, http443 string) *relayHost {
	t.Helper()
	h, err := n.Host(name, lab.HostOptions{IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	var r *relay.Server
	var l net.Listener
	err = h.Do(func() (err error) {
		if r, err = relay.New(t.Context(), relay.Options{UDP: ":3478", Probe: ":3479", Keys: []ed25519.PublicKey{public}, Sockets: 1}); err != nil {
			return err
		}
		l, err = net.Listen("tcp", http443)
		return err
	})
	if r != nil {
		t.Cleanup(func() { _ = r.Close() })
	}
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+wire.PathRelay, r)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: mux}}
	s.Start()
	t.Cleanup(s.Close)
	return &relayHost{h, fmt.Sprintf("http://%s:443", h.Addr()), mux}
}

// check runs a child on a host behind a NAT.
func (c *cloud) check(t *testing.T, opts lab.NATOptions) *Report {
	t.Helper()
	box, err := c.net.NAT("nat", opts)
	if err != nil {
		t.Fatal(err)
	}
	h, err := c.net.Host("runner", lab.HostOptions{Behind: box})
	if err != nil {
		t.Fatal(err)
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return bytes.Contains(bytes.ToLower([]byte(v)), []byte("_proxy=")) })
	var out, complaints bytes.Buffer
	code, err := h.Run(t.Context(), lab.Program{
		Path: "/proc/self/exe", Env: append(env, childEnv+"="+c.url), Stdout: &out, Stderr: &complaints,
	})
	if err != nil || code != 0 {
		t.Fatalf("the child ended with %d, %v: %s", code, err, complaints.String())
	}
	var r Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v in %s", err, out.String())
	}
	return &r
}

// Every kind of NAT is seen for what it is, and what follows from it is said.
func TestInTheLab(t *testing.T) {
	for _, tc := range []struct {
		name      string
		nat       lab.NATOptions
		udp       bool
		present   bool
		mapping   wire.Mapping
		filtering nat.Dependence
		mtu       int
		paths     [3]Path
	}{
		{"open", lab.NATOptions{Kind: lab.Open}, true, false, wire.MappingEasy, nat.AddressDependent, 1500, [3]Path{PathDirect, PathDirect, PathDirect}},
		{"full cone on a narrow link", lab.NATOptions{Kind: lab.FullCone, Link: lab.Link{MTU: 1400}}, true, true, wire.MappingEasy, nat.AddressDependent, 1400,
			[3]Path{PathDirect, PathDirect, PathDirect}},
		{"easy", lab.NATOptions{Kind: lab.Easy}, true, true, wire.MappingEasy, nat.AddressAndPortDependent, 1500, [3]Path{PathDirect, PathDirect, PathProbing}},
		{"easy with IPv6", lab.NATOptions{Kind: lab.Easy, IPv6: true}, true, true, wire.MappingEasy, nat.AddressAndPortDependent, 1500,
			[3]Path{PathDirect, PathDirect, PathProbing}},
		{"hard", lab.NATOptions{Kind: lab.Hard}, true, true, wire.MappingHard, nat.AddressAndPortDependent, 1500, [3]Path{PathDirect, PathProbing, PathUDP}},
		{"no UDP", lab.NATOptions{Kind: lab.NoUDP}, false, false, "", "", 0, [3]Path{PathWebSocket, PathWebSocket, PathWebSocket}},
		{"only TCP 443", lab.NATOptions{Kind: lab.OnlyHTTPS}, false, false, "", "", 0, [3]Path{PathWebSocket, PathWebSocket, PathWebSocket}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel() // they mostly wait for what does not come
			r := newCloud(t).check(t, tc.nat)
			if !r.Coordinator.Reachable || r.UDP.Works != tc.udp {
				t.Fatalf("coordinator %+v, udp %+v", r.Coordinator, r.UDP)
			}
			if n := r.NAT; n.Present != tc.present || n.Mapping != tc.mapping || n.Filtering != tc.filtering {
				t.Errorf("nat %+v", n)
			}
			if tc.udp && r.NAT.Destinations != 3 {
				t.Errorf("%d destinations", r.NAT.Destinations)
			}
			if got := mtuOf(r); got != tc.mtu {
				t.Errorf("mtu %d, want %d", got, tc.mtu)
			}
			if p := r.Tunnel.Paths; p.Public != tc.paths[0] || p.Easy != tc.paths[1] || p.Hard != tc.paths[2] || !r.Tunnel.Possible {
				t.Errorf("tunnel %+v", r.Tunnel)
			}
			if six := r.IPv6.Public != nil && slices.Contains(r.IPv6.Addresses, r.IPv6.Public.Addr()); six != tc.nat.IPv6 {
				t.Errorf("ipv6 %+v", r.IPv6)
			}
			for _, relay := range r.Relays {
				if !relay.WebSocket.Works || relay.UDP.Works != tc.udp {
					t.Errorf("relay %s: %+v, %+v", relay.Name, relay.UDP, relay.WebSocket)
				}
			}
		})
	}
}

func mtuOf(r *Report) int {
	if r.MTU == nil {
		return 0
	}
	return r.MTU.Bytes
}
