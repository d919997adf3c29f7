package forward

import (
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/gateway/names/namestest"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/netstack/netstacktest"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// records collects what is traced.
type records struct {
	mu  sync.Mutex
	all []wire.FlowRecord
}

func (r *records) add(rec wire.FlowRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, rec)
}

func (r *records) list() []wire.FlowRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]wire.FlowRecord(nil), r.all...)
}

// last waits for the nth record.
func (r *records) nth(t testing.TB, n int) wire.FlowRecord {
	t.Helper()
	eventually(t, "a record", func() bool { return len(r.list()) >= n })
	return r.list()[n-1]
}

// namedEnv is a gateway with the real policy and a private network's DNS. Its own address, which nothing but an exact line of
// both policies opens, is loopback.
type namedEnv struct {
	*env
	up      *namestest.Upstream
	records *records
}

// own is what the gateway's own policy opens: real targets are on loopback.
const own = "tcp 127.0.0.1:*|udp 127.0.0.1:*|icmp 127.0.0.1|tcp [::1]:*|udp [::1]:*|tcp *.svc.corp:*|tcp db.internal:*|udp db.internal:*|icmp db.internal|tcp www.internal:*"

func newNamedEnv(t testing.TB, limits Limits) *namedEnv {
	t.Helper()
	n := &namedEnv{env: &env{t: t, wire: new(netstacktest.Wire)}, up: namestest.New(t), records: new(records)}
	none := filepath.Join(t.TempDir(), "none")
	resolver, err := names.NewResolver(names.ResolverOptions{Servers: []netip.AddrPort{n.up.Addr}, Hosts: none, ResolvConf: none})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(resolver.Close)
	ranges, err := names.NewRanges(netip.MustParsePrefix("198.19.0.0/16"), gateway6)
	if err != nil {
		t.Fatal(err)
	}
	n.job = n.device(netstack.Options{Addresses: []netip.Addr{job4, job6, other4, stranger}})
	n.gateway = n.device(netstack.Options{Addresses: []netip.Addr{gateway4, gateway6}, Forward: true})
	n.f, err = New(Options{
		Device: n.gateway, Local: []netip.Addr{gateway4, gateway6}, Limits: limits, Ranges: ranges, Resolver: resolver, Trace: n.records.add,
	})
	if err != nil {
		t.Fatal(err)
	}
	n.errors = make(chan header.ICMPv4, 16)
	n.wire.Drop = func(fromA bool, packet []byte) bool {
		if ip := header.IPv4(packet); !fromA && packet[0]>>4 == 4 && ip.TransportProtocol() == header.ICMPv4ProtocolNumber {
			select {
			case n.errors <- append(header.ICMPv4(nil), ip.Payload()...):
			default:
			}
		}
		return false
	}
	n.wire.Connect(n.job, n.gateway)
	t.Cleanup(n.close)
	return n
}

// grants makes a grant of lines, "|" between them.
func grantOf(t testing.TB, lines string) *policy.Grant {
	t.Helper()
	var out []wire.Grant
	for line := range strings.SplitSeq(lines, "|") {
		if line != "" {
			out = append(out, wire.Grant{Rule: "test", Allow: line})
		}
	}
	g, err := policy.ParseGrant(out)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// realScope is a scope of the coordinator's lines and the gateway's own; "" for no policy of its own.
func realScope(t testing.TB, offered, local string) *policy.Scope {
	t.Helper()
	s := &policy.Scope{
		Offered: grantOf(t, offered), Own: func(a netip.Addr) bool { return a == netip.MustParseAddr("10.7.7.7") },
		Overlay: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd63:756c:7665:7274::/96")},
	}
	if local != "" {
		s.Local = grantOf(t, local)
	}
	return s
}

func (n *namedEnv) join(offered, local string) *Session {
	n.t.Helper()
	s, err := n.f.Add("session-1", []netip.Addr{job4, job6}, realScope(n.t, offered, local))
	if err != nil {
		n.t.Fatal(err)
	}
	n.s = s
	return s
}

// at is a name's service address with a port, as the DNS inside the tunnel would give it.
func (n *namedEnv) at(name, port string) string {
	n.t.Helper()
	addr, ok := n.s.serviceAddr(name)
	if !ok {
		n.t.Fatalf("no service address for %s", name)
	}
	return net.JoinHostPort(addr.String(), port)
}

func port(t testing.TB, address string) string {
	t.Helper()
	_, p, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A name leads where the gateway's DNS says, in either family, over aliases, at the moment when the flow begins.
func TestNamedFlow(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 1 IN A 127.0.0.1")
	n.up.Set(t, "www.internal", "www.internal. 1 IN CNAME db.internal.")
	s := n.join("tcp db.internal:*|tcp www.internal:*|tcp 127.0.0.1:*", own)
	for i, name := range []string{"db.internal", "www.internal"} {
		c, err := n.dial(n.at(name, port(t, target)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		roundTrip(t, c, "by name")
		c.Close()
		r := n.records.nth(t, i+1)
		want := wire.FlowRecord{
			Flow: uint64(i + 1), Session: "session-1", Proto: "tcp", Name: name, Addr: netip.MustParseAddrPort(target), Verdict: wire.FlowAllowed,
			Rule: "test", Began: r.Began, Lasted: r.Lasted, BytesUp: 7, BytesDn: 7, Cause: wire.CauseClosed,
		}
		if r != want {
			t.Errorf("traced as %+v\nwant %+v", r, want)
		}
	}
	_, six, _ := s.Book().Lease("db.internal", true)
	c, err := n.dial(netip.AddrPortFrom(six, netip.MustParseAddrPort(target).Port()).String())
	if err != nil {
		t.Fatalf("over IPv6 in the tunnel: %v", err)
	}
	roundTrip(t, c, "x")
	c.Close()
	if c := s.Counts(); c.Allowed != 3 || c.Denied+c.Failed != 0 {
		t.Errorf("counts %+v", c)
	}
}

// The address that does not answer is passed over for one that does.
func TestNamedFlowTriesAddresses(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 60 IN A 127.0.0.1", "db.internal. 60 IN AAAA ::1")
	n.join("tcp db.internal:*|tcp 127.0.0.1:*|tcp [::1]:*", own)
	c, err := n.dial(n.at("db.internal", port(t, target))) // nobody is at [::1]
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "x")
	c.Close()
	if r := n.records.nth(t, 1); r.Addr != netip.MustParseAddrPort(target) {
		t.Errorf("traced as %+v", r)
	}
}

// Whatever a granted name is made to lead to, what is always denied stays so.
func TestRebindingGainsNothing(t *testing.T) {
	loopbackTarget := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	s := n.join("tcp db.internal:*", "")
	at := n.at("db.internal", port(t, loopbackTarget))
	for i, addr := range []string{
		"127.0.0.1", "169.254.169.254", "169.254.1.1", "0.0.0.0", "224.0.0.1", "168.63.129.16", "10.7.7.7", "198.18.0.3", "198.19.0.1", "255.255.255.255",
		"::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "fe80::1", "2002:7f00:1::", "fd00:ec2::254", "fd63:756c:7665:7274::c612:3", "ff02::1", "::",
	} {
		kind := "A"
		if strings.Contains(addr, ":") {
			kind = "AAAA"
		}
		n.up.Set(t, "db.internal", "db.internal. 1 IN "+kind+" "+addr)
		n.f.resolver = freshResolver(t, n.up) // instead of waiting for the last answer to expire
		if _, err := n.dial(at); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", addr, err)
		}
		r := n.records.nth(t, i+1)
		if r.Verdict != wire.FlowRefused || r.Name != "db.internal" || !strings.HasPrefix(r.Reason, "its name leads to: ") || r.Count != 1 {
			t.Errorf("%s is traced as %+v", addr, r)
		}
	}
	if c := s.Counts(); c.Allowed != 0 || c.Denied != 20 {
		t.Errorf("counts %+v", c)
	}
}

func freshResolver(t testing.TB, up *namestest.Upstream) *names.Resolver {
	t.Helper()
	none := filepath.Join(t.TempDir(), "none")
	r, err := names.NewResolver(names.ResolverOptions{Servers: []netip.AddrPort{up.Addr}, Hosts: none, ResolvConf: none})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// What a name that leads nowhere looks like, and what a job sees of ports and names that it has not.
func TestNamedRefusals(t *testing.T) {
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "empty.svc.corp", `empty.svc.corp. 60 IN TXT "x"`)
	s := n.join("tcp db.internal:5432|tcp *.svc.corp:443", "")
	free := n.f.ranges.Prefixes()[0].Addr().Next()
	for i, tt := range []struct {
		to      string
		errno   error
		verdict wire.FlowVerdict
		cause   wire.FlowCause
	}{
		{n.at("gone.svc.corp", "443"), syscall.EHOSTUNREACH, wire.FlowAllowed, wire.CauseNoName},
		{n.at("empty.svc.corp", "443"), syscall.EHOSTUNREACH, wire.FlowAllowed, wire.CauseNoName},
		{n.at("db.internal", "22"), syscall.ECONNREFUSED, wire.FlowRefused, ""},
		{net.JoinHostPort(free.String(), "443"), syscall.ECONNREFUSED, wire.FlowRefused, ""},
	} {
		if _, err := n.dial(tt.to); !errors.Is(err, tt.errno) {
			t.Errorf("%s: %v, want %v", tt.to, err, tt.errno)
		}
		if r := n.records.nth(t, i+1); r.Verdict != tt.verdict || r.Cause != tt.cause {
			t.Errorf("%s is traced as %+v", tt.to, r)
		}
	}
	if c := s.Counts(); c.Allowed != 2 || c.Failed != 2 || c.Denied != 2 {
		t.Errorf("counts %+v", c)
	}
}

// One session's service address is nothing to another, even if that one may use the name.
func TestServiceAddressesAreTheSessionsOwn(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "a.svc.corp", "a.svc.corp. 60 IN A 127.0.0.1")
	const lines = "tcp *.svc.corp:*|tcp 127.0.0.1:*"
	n.join(lines, own)
	second, err := n.f.Add("session-2", []netip.Addr{other4}, realScope(t, lines, own))
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(n.at("a.svc.corp", port(t, target)))
	if c, err := n.dialFrom(other4, at, 10*time.Second); err == nil {
		c.Close()
		t.Error("a session uses an address that it was not given")
	}
	if _, ok := second.serviceAddr("a.svc.corp"); !ok {
		t.Fatal("no address")
	}
	c, err := n.dialFrom(other4, at, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "x")
	c.Close()
}

func TestNamedUDP(t *testing.T) {
	target := udpEcho(t)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 60 IN A 127.0.0.1")
	n.join("udp db.internal:*|udp 127.0.0.1:*", own)
	c := n.udp(n.at("db.internal", port(t, target.LocalAddr().String())))
	exchange(t, c, []byte("by name"))
	n.f.Remove(n.s)
	r := n.records.nth(t, 1)
	if r.Proto != "udp" || r.Name != "db.internal" || r.Cause != wire.CauseSession || r.BytesUp != 7 || r.Addr.String() != target.LocalAddr().String() {
		t.Errorf("traced as %+v", r)
	}
}

func TestNamedUDPRefused(t *testing.T) {
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 60 IN A 169.254.169.254")
	n.join("udp db.internal:*", "")
	if _, err := n.udp(n.at("db.internal", "53")).Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if got := <-n.errors; got.Type() != header.ICMPv4DstUnreachable || got.Code() != header.ICMPv4AdminProhibited {
		t.Errorf("type %d code %d", got.Type(), got.Code())
	}
}

// A grant that is taken back ends the flows to its names, also one whose name is just being resolved.
func TestRescopeOfNames(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 60 IN A 127.0.0.1")
	s := n.join("tcp db.internal:*|tcp 127.0.0.1:*", own)
	c, err := n.dial(n.at("db.internal", port(t, target)))
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "x")
	s.SetScope(realScope(t, "tcp db.internal:*|tcp 127.0.0.1:*", own))
	roundTrip(t, c, "still there")
	s.SetScope(realScope(t, "tcp db.internal:*", own)) // loopback is open no more
	reset(t, c)
	if r := n.records.nth(t, 1); r.Cause != wire.CauseRevoked {
		t.Errorf("traced as %+v", r)
	}
	fl := &flow{s: s, key: flowKey{policy.TCP, netip.AddrPort{}, netip.MustParseAddrPort("198.19.0.1:80")}, judgement: judgement{name: "db.internal"}}
	s.SetScope(realScope(t, "tcp other.internal:*", own))
	if fl.settle(netip.MustParseAddrPort("10.0.0.1:80"), policy.Verdict{Allowed: true}) {
		t.Error("a flow that was resolved under the old scope goes on under the new one")
	}
}

func TestReachByName(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	n.up.Set(t, "db.internal", "db.internal. 60 IN A 127.0.0.1")
	n.up.Set(t, "meta.svc.corp", "meta.svc.corp. 60 IN A 169.254.169.254")
	s := n.join("tcp db.internal:*|tcp *.svc.corp:*|tcp 127.0.0.1:*", own)
	p := netip.MustParseAddrPort(target).Port()
	for name, want := range map[string]wire.ReachResult{
		"db.internal": {Verdict: wire.Reachable, Rule: "test"},
		"meta.svc.corp": {Verdict: wire.FlowDenied, Rule: "test", Reason: "its name leads to: cloud metadata address",
			Next: "only a line that names exactly 169.254.169.254 opens it, in the coordinator's policy and in the gateway's own --policy; the coordinator's policy has none, and the gateway's own --policy has none"},
		"gone.svc.corp": {Verdict: wire.Unreachable, Rule: "test", Reason: "the name does not exist"},
		"other.internal": {Verdict: wire.FlowDenied, Reason: "not granted by this name",
			Next: "ask for a rule that allows it, or for the address that you mean"},
	} {
		got := s.Reach(Target{Name: name, Port: p})
		got.RTT = 0
		if got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}

func TestObservedFlows(t *testing.T) {
	target := server(t, "tcp4", echo)
	n := newNamedEnv(t, Limits{})
	g, err := policy.ParseGrant([]wire.Grant{{Rule: "watch", Observe: "192.0.2.0/24"}, {Rule: "loop", Allow: "tcp 127.0.0.1:*"}})
	if err != nil {
		t.Fatal(err)
	}
	scope := realScope(t, "", own)
	scope.Offered = g
	scope.Local = grantOf(t, own+"|tcp 192.0.2.0/24:*")
	n.s, err = n.f.Add("session-1", []netip.Addr{job4, job6}, scope)
	if err != nil {
		t.Fatal(err)
	}
	n.f.limits.DialTimeout = time.Nanosecond // nobody is at an address of TEST-NET
	if _, err := n.dial("192.0.2.1:80"); err == nil {
		t.Error("somebody is at an address of TEST-NET")
	}
	if r := n.records.nth(t, 1); r.Verdict != wire.FlowObserved || r.Rule != "watch" || r.Cause != wire.CauseTimeout {
		t.Errorf("traced as %+v", r)
	}
	n.f.limits.DialTimeout = 10 * time.Second
	c, err := n.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if c := n.s.Counts(); c.Observed != 1 || c.Allowed != 1 {
		t.Errorf("counts %+v", c)
	}
}
