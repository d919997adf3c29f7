package names

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/gateway/names/namestest"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// asker is a session with a grant of its own.
type asker struct {
	scope   *policy.Scope
	book    *Book
	queries atomic.Int64 // left
	lookups chan struct{}

	mu      sync.Mutex
	refused []string
}

func newAsker(t testing.TB, lines ...string) *asker {
	t.Helper()
	var grants []wire.Grant
	for _, l := range lines {
		grants = append(grants, wire.Grant{Rule: "r", Allow: l})
	}
	g, err := policy.ParseGrant(grants)
	if err != nil {
		t.Fatal(err)
	}
	a := &asker{scope: &policy.Scope{Offered: g}, book: NewBook(ranges(t, "198.19.0.0/16"), 5), lookups: make(chan struct{}, 4)}
	a.queries.Store(1 << 20)
	return a
}

func (a *asker) KnowsName(name string) bool { return a.scope.KnowsName(name) }
func (a *asker) ExactName(name string) bool { return a.scope.ExactName(name) }
func (a *asker) Book() *Book                { return a.book }
func (a *asker) TakeQuery() bool            { return a.queries.Add(-1) >= 0 }

func (a *asker) TakeLookup() (func(), bool) {
	select {
	case a.lookups <- struct{}{}:
		return func() { <-a.lookups }, true
	default:
		return nil, false
	}
}

func (a *asker) NameRefused(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refused = append(a.refused, name)
}

// world is a server on loopback that takes everybody for one session.
type world struct {
	server *Server
	up     *namestest.Upstream
	addr   string
}

func newWorld(t testing.TB, a *asker) *world {
	t.Helper()
	w := &world{up: namestest.New(t)}
	var err error
	w.server, err = NewServer(ServerOptions{
		Resolver: resolver(t, w.up, nil), Ranges: ranges(t, "198.19.0.0/16"),
		Session: func(netip.Addr) Session {
			if a == nil {
				return nil
			}
			return a
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := net.ListenPacket("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() { w.server.ServePacket(p) })
	serving.Go(func() { w.server.ServeStream(l) })
	t.Cleanup(func() {
		p.Close()
		l.Close()
		w.server.Close()
		serving.Wait()
	})
	return w
}

// ask asks one question over a network, with EDNS0.
func (w *world) ask(t testing.TB, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	m.SetEdns0(4096, false)
	c := dns.Client{Net: network, Timeout: 20 * time.Second}
	r, _, err := c.Exchange(m, w.addr)
	if err != nil {
		t.Fatalf("%s %s over %s: %v", name, dns.TypeToString[qtype], network, err)
	}
	return r
}

// shown is what a reply says, on one line.
func shown(m *dns.Msg) string {
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range append(append([]dns.RR(nil), m.Answer...), m.Extra...) {
		if rr.Header().Rrtype != dns.TypeOPT {
			out = append(out, strings.Join(strings.Fields(rr.String()), " "))
		}
	}
	return strings.Join(out, "; ")
}

func TestAnswers(t *testing.T) {
	a := newAsker(t, "tcp db.internal:5432", "tcp *.svc.corp:443", "tcp pg1.internal:5432", "tcp www.internal:80", "tcp gone.internal:1", "tcp text.internal:1", "tcp odd.internal:1")
	w := newWorld(t, a)
	w.up.Set(t, "db.internal", "db.internal. 60 IN A 10.0.0.5")
	w.up.Set(t, "text.internal", `text.internal. 60 IN TXT "x"`)
	w.up.Set(t, "www.internal", "www.internal. 30 IN CNAME pg1.internal.")
	w.up.Set(t, "odd.internal", "odd.internal. 30 IN CNAME secret.internal.")
	w.up.Set(t, "secret.internal", "secret.internal. 30 IN A 10.0.0.8")
	w.up.Set(t, "pg1.internal", "pg1.internal. 60 IN A 10.0.0.6")
	w.up.Set(t, "_pg._tcp.db.internal", "_pg._tcp.db.internal. 20 IN SRV 1 2 5432 PG1.internal.", "_pg._tcp.db.internal. 20 IN SRV 1 2 5432 secret.internal.")
	w.up.Set(t, "_no._tcp.db.internal", "_no._tcp.db.internal. 20 IN SRV 1 2 5432 secret.internal.")
	four := func(name string) string {
		addr, _, ok := a.book.Lease(name, true)
		if !ok {
			t.Fatalf("no address for %s", name)
		}
		return addr.String()
	}
	six := func(name string) string {
		_, addr, _ := a.book.Lease(name, true)
		return addr.String()
	}
	tests := []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"db.internal.", dns.TypeA, "NOERROR; db.internal. 60 IN A " + four("db.internal")},
		{"DB.Internal.", dns.TypeA, "NOERROR; DB.Internal. 60 IN A " + four("db.internal")},
		{"db.internal.", dns.TypeAAAA, "NOERROR; db.internal. 60 IN AAAA " + six("db.internal")},
		{"db.internal.", dns.TypeANY, "NOERROR; db.internal. 60 IN A " + four("db.internal") + "; db.internal. 60 IN AAAA " + six("db.internal")},
		{"db.internal.", dns.TypeMX, "NOERROR"},
		{"db.internal.", dns.TypeTXT, "NOERROR"},
		{"db.internal.", dns.TypeHTTPS, "NOERROR"},
		{"gone.internal.", dns.TypeA, "NXDOMAIN"},
		{"text.internal.", dns.TypeA, "NOERROR"},
		{"www.internal.", dns.TypeA, "NOERROR; www.internal. 60 IN A " + four("www.internal")},
		{"www.internal.", dns.TypeCNAME, "NOERROR; www.internal. 30 IN CNAME pg1.internal."},
		{"db.internal.", dns.TypeCNAME, "NOERROR"},
		{"odd.internal.", dns.TypeA, "NOERROR; odd.internal. 60 IN A " + four("odd.internal")},
		{"odd.internal.", dns.TypeCNAME, "NOERROR"},
		{"secret.internal.", dns.TypeA, "REFUSED"},
		{"_pg._tcp.db.internal.", dns.TypeSRV, "NOERROR; _pg._tcp.db.internal. 20 IN SRV 1 2 5432 pg1.internal.; pg1.internal. 60 IN A " +
			four("pg1.internal") + "; pg1.internal. 60 IN AAAA " + six("pg1.internal")},
		{"_no._tcp.db.internal.", dns.TypeSRV, "NOERROR"},
		{"_gone._tcp.db.internal.", dns.TypeSRV, "NXDOMAIN"},
		{"_pg._tcp.db.internal.", dns.TypeA, "REFUSED"},
		{"a._pg._tcp.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_pg._secret.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_pg.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_tcp.db.internal.", dns.TypeSRV, "REFUSED"},
		{"pg._tcp.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_sixteen-letters1._tcp.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_fifteen-letters._tcp.db.internal.", dns.TypeSRV, "NXDOMAIN"},
		{"_a._b._c.db.internal.", dns.TypeSRV, "REFUSED"},
		{"_pg._tcp.other.internal.", dns.TypeSRV, "REFUSED"},
		{"svc.corp.", dns.TypeA, "REFUSED"},
		{"corp.", dns.TypeNS, "REFUSED"},
		{".", dns.TypeNS, "REFUSED"},
		{`a\.b.svc.corp.`, dns.TypeA, "REFUSED"},
		{"x.db.internal.", dns.TypeA, "REFUSED"},
		{"4.3.2.1.in-addr.arpa.", dns.TypePTR, "REFUSED"},
		{"1.0.19.198.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
	}
	for _, tt := range tests {
		for _, network := range []string{"udp", "tcp"} {
			m := w.ask(t, network, tt.name, tt.qtype)
			if got := shown(m); got != tt.want {
				t.Errorf("%s %s over %s: %s\nwant %s", tt.name, dns.TypeToString[tt.qtype], network, got, tt.want)
			}
			negative := m.Rcode == dns.RcodeNameError || m.Rcode == dns.RcodeSuccess && len(m.Answer) == 0
			if negative != (len(m.Ns) == 1 && m.Ns[0].Header().Rrtype == dns.TypeSOA && dns.IsSubDomain(m.Ns[0].Header().Name, m.Question[0].Name)) {
				t.Errorf("%s %s over %s: authority %v", tt.name, dns.TypeToString[tt.qtype], network, m.Ns)
			}
		}
	}
	reverse, _ := dns.ReverseAddr(four("db.internal"))
	if got := shown(w.ask(t, "udp", reverse, dns.TypePTR)); got != "NOERROR; "+reverse+" 5 IN PTR db.internal." {
		t.Error(got)
	}
	reverse, _ = dns.ReverseAddr(six("db.internal"))
	if got := shown(w.ask(t, "udp", reverse, dns.TypePTR)); got != "NOERROR; "+reverse+" 5 IN PTR db.internal." {
		t.Error(got)
	}
	if c := w.server.Counts(); c.Refused == 0 || int(c.Refused) != len(a.refused) || c.Answered == 0 {
		t.Errorf("%+v, %d names told", c, len(a.refused))
	}
}

// Nothing that a job asks for by address under a wildcard, or outside its grant, is heard of upstream.
func TestNothingLeaks(t *testing.T) {
	a := newAsker(t, "tcp *.svc.corp:443", "tcp db.internal:5432")
	w := newWorld(t, a)
	for i := range 20 {
		for _, name := range []string{"secret%d.svc.corp.", "secret%d.evil.example.", "secret%d.db.internal.", "_x%d.db.internal."} {
			w.ask(t, "udp", fmt.Sprintf(name, i), dns.TypeA)
		}
		w.ask(t, "udp", fmt.Sprintf("secret%d.evil.example.", i), dns.TypeTXT)
		w.ask(t, "udp", fmt.Sprintf("_a%d._tcp.evil.example.", i), dns.TypeSRV)
		w.ask(t, "udp", fmt.Sprintf("secret%d.svc.corp.", i), dns.TypeTXT)
		w.ask(t, "udp", fmt.Sprintf("secret%d.svc.corp.", i), dns.TypeNULL)
	}
	if n := w.up.Questions(); n != 0 {
		t.Errorf("upstream heard %d questions", n)
	}
	// What only upstream knows is bounded over the session's life. Five names had been counted already.
	for i := range 20 {
		w.ask(t, "udp", fmt.Sprintf("_s%d._tcp.x.svc.corp.", i), dns.TypeSRV)
		w.ask(t, "udp", fmt.Sprintf("c%d.svc.corp.", i), dns.TypeCNAME)
		w.ask(t, "udp", fmt.Sprintf("_s%d._tcp.db.internal.", i), dns.TypeSRV)
	}
	if n := w.up.Questions(); n != 0 {
		t.Errorf("upstream heard %d questions of a session that had used up its names", n)
	}
	if got := shown(w.ask(t, "udp", "secret19.svc.corp.", dns.TypeA)); got != "SERVFAIL" {
		t.Errorf("a sixth name: %s", got)
	}
	if got := w.ask(t, "udp", "secret0.svc.corp.", dns.TypeA); len(got.Answer) != 1 {
		t.Errorf("one of the five: %s", shown(got))
	}
}

func TestRefusalSaysWhy(t *testing.T) {
	w := newWorld(t, newAsker(t, "tcp db.internal:1"))
	m := w.ask(t, "udp", "other.internal.", dns.TypeA)
	opt := m.IsEdns0()
	if opt == nil || len(opt.Option) != 1 || !strings.Contains(opt.Option[0].String(), refusedText) {
		t.Errorf("%v", m)
	}
	if m.Authoritative || !m.RecursionAvailable {
		t.Errorf("flags %+v", m.MsgHdr)
	}
	plain := new(dns.Msg)
	plain.SetQuestion("db.internal.", dns.TypeA)
	r, err := dns.Exchange(plain, w.addr)
	if err != nil || r.IsEdns0() != nil {
		t.Errorf("EDNS0 was answered to who did not ask for it: %v, %v", r, err)
	}
}

// An upstream that is away does not keep a job from its name: the flow will tell.
func TestUpstreamAway(t *testing.T) {
	w := newWorld(t, newAsker(t, "tcp db.internal:1"))
	w.up.SetSilent(true)
	if m := w.ask(t, "udp", "db.internal.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("%s", shown(m))
	}
	w.up.SetSilent(false)
	w.up.SetRcode(dns.RcodeServerFailure)
	if got := shown(w.ask(t, "udp", "_a._tcp.db.internal.", dns.TypeSRV)); got != "SERVFAIL" {
		t.Error(got)
	}
}

func TestTruncation(t *testing.T) {
	a := newAsker(t, "tcp db.internal:1", "tcp *.db.internal:1")
	a.book = NewBook(ranges(t, "198.19.0.0/16"), 100)
	w := newWorld(t, a)
	var lines []string
	for i := range 30 {
		lines = append(lines, fmt.Sprintf("_a._tcp.db.internal. 20 IN SRV 1 2 5432 a-rather-long-name-for-a-host-%d.db.internal.", i))
	}
	w.up.Set(t, "_a._tcp.db.internal", lines...)
	m := w.ask(t, "udp", "_a._tcp.db.internal.", dns.TypeSRV)
	m.Compress = true
	if !m.Truncated || m.Len() > edns {
		t.Errorf("truncated %v, %d bytes", m.Truncated, m.Len())
	}
	if m := w.ask(t, "tcp", "_a._tcp.db.internal.", dns.TypeSRV); m.Truncated || len(m.Answer) != 30 || len(m.Extra) != 61 {
		t.Errorf("over TCP %d records and %d more", len(m.Answer), len(m.Extra))
	}
}

// exchange sends raw bytes over UDP; nil where nothing comes back before the answer to a proper question does.
func (w *world) exchange(t testing.TB, b []byte) *dns.Msg {
	t.Helper()
	c, err := net.Dial("udp4", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	probe := new(dns.Msg)
	probe.SetQuestion("probe.example.", dns.TypeA)
	p, _ := probe.Pack()
	for _, out := range [][]byte{b, p} {
		if _, err := c.Write(out); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 4096)
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(buf[:n]); err != nil {
		t.Fatal(err)
	}
	if m.Id == probe.Id {
		return nil
	}
	return m
}

func TestBadMessages(t *testing.T) {
	w := newWorld(t, newAsker(t, "tcp *.internal:1"))
	pack := func(change func(*dns.Msg)) []byte {
		m := new(dns.Msg)
		m.SetQuestion("db.internal.", dns.TypeA)
		m.Id = 77
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := pack(func(*dns.Msg) {})
	for name, tt := range map[string]struct {
		msg  []byte
		want int // -1 for no answer
	}{
		"good":          {good, dns.RcodeSuccess},
		"empty":         {nil, -1},
		"short":         {good[:11], -1},
		"cut":           {good[:20], dns.RcodeFormatError},
		"a reply":       {pack(func(m *dns.Msg) { m.Response = true }), -1},
		"an update":     {pack(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		"no question":   {pack(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		"two questions": {pack(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		"class CH":      {pack(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		"EDNS1":         {pack(func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }), dns.RcodeBadVers},
		"too long":      {append(good, make([]byte, maxQuery)...), -1},
	} {
		m := w.exchange(t, tt.msg)
		switch {
		case tt.want < 0 && m != nil:
			t.Errorf("%s is answered: %v", name, m)
		case tt.want >= 0 && (m == nil || m.Rcode != tt.want || m.Id != 77 || !m.Response):
			t.Errorf("%s: %v, want %s", name, m, dns.RcodeToString[tt.want])
		}
	}
}

func TestAllowances(t *testing.T) {
	a := newAsker(t, "tcp db.internal:1")
	w := newWorld(t, a)
	for range cap(a.lookups) {
		if _, ok := a.TakeLookup(); !ok {
			t.Fatal("no place")
		}
	}
	if got := shown(w.ask(t, "udp", "_a._tcp.db.internal.", dns.TypeSRV)); got != "SERVFAIL" {
		t.Errorf("no place left upstream: %s", got)
	}
	a.queries.Store(0)
	c, err := net.Dial("tcp4", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m := new(dns.Msg)
	m.SetQuestion("db.internal.", dns.TypeA)
	b, _ := m.Pack()
	_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("a question over the allowance was answered: %d, %v", n, err)
	}
	if w.server.Counts().Limited == 0 {
		t.Error("nothing was counted")
	}
}

// Strangers get nothing, not even a refusal.
func TestStrangers(t *testing.T) {
	w := newWorld(t, nil)
	c, err := net.Dial("tcp4", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestReversed(t *testing.T) {
	for _, text := range []string{"198.19.0.1", "fd63:756c:7665:7274::c613:1", "::", "255.255.255.255"} {
		name, err := dns.ReverseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := reversed(strings.TrimSuffix(name, ".")); !ok || got.String() != text {
			t.Errorf("%s reads as %v, %v", name, got, ok)
		}
	}
	for _, bad := range []string{"", "in-addr.arpa", ".in-addr.arpa", "1.2.3.in-addr.arpa", "1.2.3.256.in-addr.arpa", "x.2.3.4.in-addr.arpa", "1.ip6.arpa", strings.Repeat("g.", 31) + "g.ip6.arpa", strings.Repeat("10.", 31) + "1.ip6.arpa"} {
		if got, ok := reversed(bad); ok {
			t.Errorf("%q reads as %v", bad, got)
		}
	}
}
