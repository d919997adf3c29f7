//go:build linux

package e2e

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/requirements"
	"github.com/culvertnet/culvert/internal/stage"
)

// flow is who opened what: a TCP connection, or a pair of UDP ports by its first datagram.
type flow struct {
	protocol string
	from, to netip.AddrPort
}

// tap sees every packet of a host, from its sockets' side, until the test ends.
type tap struct {
	fd   int
	done chan struct{}

	mu    sync.Mutex
	flows map[flow]bool
}

func startTap(t *testing.T, h *lab.Host) *tap {
	t.Helper()
	a := &tap{done: make(chan struct{}), flows: map[flow]bool{}}
	err := h.Do(func() (err error) {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
		a.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		if err != nil {
			return err
		}
		return unix.SetsockoptTimeval(a.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
	})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go a.watch(stop)
	t.Cleanup(func() {
		close(stop)
		<-a.done
		_ = unix.Close(a.fd)
	})
	return a
}

func (a *tap) watch(stop <-chan struct{}) {
	defer close(a.done)
	packet := make([]byte, 128)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, _, err := unix.Recvfrom(a.fd, packet, unix.MSG_TRUNC)
		if err != nil {
			continue // the timeout
		}
		if f, ok := parse(packet[:min(n, len(packet))]); ok {
			a.mu.Lock()
			if !a.flows[flow{f.protocol, f.to, f.from}] {
				a.flows[f] = true
			}
			a.mu.Unlock()
		}
	}
}

// parse reads the flow that an IP packet belongs to. Of TCP it takes what opens a connection.
func parse(p []byte) (flow, bool) {
	if len(p) < 40 {
		return flow{}, false
	}
	var from, to netip.Addr
	protocol, head := byte(0), 40
	switch p[0] >> 4 {
	case 4:
		from, to, protocol, head = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[9], int(p[0]&15)*4
		if binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
			return flow{}, false
		}
	case 6:
		from, to, protocol = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:])), p[6]
	}
	if len(p) < head+14 {
		return flow{}, false
	}
	f := flow{
		from: netip.AddrPortFrom(from, binary.BigEndian.Uint16(p[head:])),
		to:   netip.AddrPortFrom(to, binary.BigEndian.Uint16(p[head+2:])),
	}
	switch protocol {
	case unix.IPPROTO_TCP:
		f.protocol = "TCP"
		const syn, ack = 2, 16
		return f, p[head+13]&(syn|ack) == syn
	case unix.IPPROTO_UDP:
		f.protocol = "UDP"
		return f, true
	}
	return flow{}, false
}

// seen are the rows of a party's table that its host's flows fit, and the flows that fit none.
func (a *tap) seen(p requirements.Party, h *lab.Host, known map[netip.Addr][]string) (rows map[string]bool, strange []flow) {
	a.mu.Lock()
	defer a.mu.Unlock()
	rows = map[string]bool{}
	for f := range a.flows {
		direction, peer := requirements.Out, f.to
		if f.from.Addr() != h.Addr() {
			direction, peer = requirements.In, netip.AddrPortFrom(f.from.Addr(), f.to.Port())
		}
		if f.from.Addr() == f.to.Addr() || f.from.Addr().IsLoopback() || f.to.Addr().IsMulticast() || inTunnel(f) {
			continue
		}
		found := false
		for _, r := range requirements.All() {
			fits := r.Party == p && r.Direction == direction && strings.Contains(r.Protocol, f.protocol) && covers(r.Port, peer.Port()) &&
				(direction == requirements.In || slices.Contains(known[peer.Addr()], r.ID))
			if fits {
				rows[r.ID], found = true, true
			}
		}
		if !found {
			strange = append(strange, f)
		}
	}
	return rows, strange
}

// inTunnel reports whether a flow is of the overlay, which leaves the host only inside of WireGuard.
func inTunnel(f flow) bool {
	return netip.MustParsePrefix("198.18.0.0/15").Contains(f.from.Addr()) || netip.MustParsePrefix("198.18.0.0/15").Contains(f.to.Addr()) ||
		netip.MustParsePrefix("fd63:756c:7665:7274::/64").Contains(f.from.Addr())
}

// covers reports whether a row's port, "443", "3478 (…)", "1024–65535" or words, covers one.
func covers(row string, port uint16) bool {
	first, _, _ := strings.Cut(row, " ")
	a, b, ranged := strings.Cut(first, "–")
	low, err := strconv.Atoi(a)
	if err != nil {
		return true // "any", "as granted"
	}
	high := low
	if ranged {
		high, _ = strconv.Atoi(b)
	}
	return low <= int(port) && int(port) <= high
}

// watched are the jobs whose networks are listened to, and the rows that they must have used.
var watched = map[string]struct {
	opts stage.Options
	want []string
}{
	"direct": {want: []string{
		"runner/coordinator", "runner/token", "runner/stun", "runner/probe", "runner/direct",
		"gateway/coordinator", "gateway/issuer", "gateway/stun", "gateway/probe", "gateway/direct", "gateway/targets",
		"coordinator/https", "coordinator/stun", "coordinator/probe", "coordinator/issuer",
	}},
	"UDP blocked": {
		opts: stage.Options{Runner: lab.NATOptions{Kind: lab.NoUDP}, Relays: []stage.RelayOptions{{Name: "far"}}},
		want: []string{
			"runner/coordinator", "runner/token", "runner/relay-https", "gateway/coordinator", "gateway/issuer", "gateway/relay-udp",
			"coordinator/https", "relay/https", "relay/udp",
		},
	},
}

// seenElsewhere are the rows that these jobs have no use for, and the test in which they are used.
var seenElsewhere = map[string]string{
	"runner/dns":            "client/names: here hosts know each other by address",
	"runner/release":        "TestWorkflows, with a release of its own",
	"runner/relay-udp":      "TestRelaysElsewhere",
	"gateway/dns":           "TestOverlappingNetworks, by --resolver",
	"gateway/relay-https":   "TestEveryNetworkConnects, of gateways without UDP",
	"gateway/listen":        "TestEveryNetworkConnects, of gateways without a NAT",
	"gateway/router":        "internal/portmap, against miniupnpd",
	"gateway/metrics":       "TestImages, by the health check",
	"coordinator/filter":    "internal/netcheck",
	"coordinator/dns":       "client/names, as for runner/dns",
	"coordinator/nats":      "internal/e2e/scale",
	"coordinator/acme":      "coordinator/server, against Pebble",
	"coordinator/challenge": "coordinator/server, against Pebble",
	"coordinator/private":   "coordinator/server",
	"relay/probe":           "coordinator/relayd",
	"relay/metrics":         "coordinator/relayd",
}

// TestNothingUndocumented: what the programs open or receive during a job's life is in the table that firewall teams get, and what the table
// has is used, here or in another test.
func TestNothingUndocumented(t *testing.T) {
	var used []string
	for name, c := range watched {
		used = append(used, c.want...)
		t.Run(name, func(t *testing.T) { watchJob(t, c.opts, c.want) })
	}
	for _, r := range requirements.All() {
		if _, other := seenElsewhere[r.ID]; slices.Contains(used, r.ID) == other {
			t.Errorf("%s is in the table: either a watched job uses it, or another test, which is named", r.ID)
		}
	}
}

// TestSeenElsewhere: the tests that the list above names are there.
func TestSeenElsewhere(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	must(t, err)
	var source strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		must(t, err)
		source.Write(text)
	}
	for id, where := range seenElsewhere {
		where, _, _ = strings.Cut(strings.ReplaceAll(where, ":", ","), ",")
		found := strings.Contains(source.String(), "\nfunc "+where+"(t *testing.T)")
		if !strings.HasPrefix(where, "Test") {
			tests, err := filepath.Glob("../../" + where + "/*_test.go")
			found = err == nil && len(tests) > 0
		}
		if !found {
			t.Errorf("%s is said to be seen in %s, which is not there", id, where)
		}
	}
}

func watchJob(t *testing.T, opts stage.Options, want []string) {
	s := scenery(t, opts)
	parties := map[requirements.Party]*lab.Host{requirements.Runner: s.Runner, requirements.Gateway: s.GatewayBox, requirements.Coordinator: s.Cloud}
	if len(s.Relays) > 0 {
		parties[requirements.Relay] = s.Relays[0].Host
	}
	taps := map[requirements.Party]*tap{}
	for p, h := range parties {
		taps[p] = startTap(t, h)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	job, err := s.Job(stage.JobOptions{})
	if err != nil {
		t.Fatal(err)
	}
	up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	known := peers(s)
	missing := func() []string {
		rows := map[string]bool{}
		for p, a := range taps {
			used, _ := a.seen(p, parties[p], known[p])
			maps.Copy(rows, used)
		}
		return slices.DeleteFunc(slices.Clone(want), func(id string) bool { return rows[id] })
	}
	for deadline := time.Now().Add(20 * time.Second); len(missing()) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	if r, err := job.Culvert(t.Context(), "down"); err != nil || r.Code != 0 {
		t.Fatalf("down: %v, %v", r, err)
	}
	if left := missing(); len(left) > 0 {
		t.Errorf("nothing was seen of %v", left)
	}
	for p, a := range taps {
		_, strange := a.seen(p, parties[p], known[p])
		for _, f := range strange {
			t.Errorf("%s: %s %v → %v is in no row of its table", p, f.protocol, f.from, f.to)
		}
	}
}

// peers says by which rows each party may speak to each address.
func peers(s *stage.Stage) map[requirements.Party]map[netip.Addr][]string {
	cloud, issuer := s.Cloud.Addr(), s.IssuerHost.Addr()
	out := map[requirements.Party]map[netip.Addr][]string{
		requirements.Runner: {
			cloud:                 {"runner/coordinator", "runner/stun", "runner/probe"},
			issuer:                {"runner/token"},
			s.GatewayBox.Public(): {"runner/direct"}, s.GatewayBox.Addr(): {"runner/direct"},
		},
		requirements.Gateway: {
			cloud:             {"gateway/coordinator", "gateway/stun", "gateway/probe"},
			issuer:            {"gateway/issuer"},
			s.Runner.Public(): {"gateway/direct"}, s.Runner.Addr(): {"gateway/direct"},
			s.Private.Addr():     {"gateway/targets"},
			router(s.GatewayBox): {"gateway/router"},
		},
		requirements.Coordinator: {issuer: {"coordinator/issuer"}},
	}
	for _, r := range s.Relays {
		for _, p := range []requirements.Party{requirements.Runner, requirements.Gateway} {
			out[p][r.Host.Addr()] = []string{fmt.Sprintf("%s/relay-https", p), fmt.Sprintf("%s/relay-udp", p)}
		}
	}
	return out
}

// router is the first address of a host's network, where its NAT is.
func router(h *lab.Host) netip.Addr {
	a := h.Addr().As4()
	a[3] = 1
	return netip.AddrFrom4(a)
}
