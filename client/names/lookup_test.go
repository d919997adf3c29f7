package names

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// fakeGateway answers on loopback as it is told to.
type fakeGateway struct {
	conn  net.PacketConn
	wait  sync.WaitGroup
	mu    sync.Mutex
	drop  int // questions that get lost
	asked int
	reply func(q dnsmessage.Message) []byte
}

func newFakeGateway(t *testing.T) (*fakeGateway, *Resolver) {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &fakeGateway{conn: conn}
	g.wait.Go(g.serve)
	t.Cleanup(func() {
		conn.Close()
		g.wait.Wait()
	})
	r := NewResolver(func(ctx context.Context, network, address string) (net.Conn, error) {
		if address != "198.18.0.1:53" {
			t.Errorf("dialled %s", address)
		}
		return (&net.Dialer{}).DialContext(ctx, network, conn.LocalAddr().String())
	}, "coordinator.example.com")
	return g, r
}

func (g *fakeGateway) serve() {
	buf := make([]byte, 1500)
	for {
		n, from, err := g.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		g.mu.Lock()
		g.asked++
		g.drop--
		var q dnsmessage.Message
		if err := q.Unpack(buf[:n]); err == nil && g.drop < 0 {
			_, _ = g.conn.WriteTo(g.reply(q), from)
		}
		g.mu.Unlock()
	}
}

func (g *fakeGateway) set(drop int, reply func(q dnsmessage.Message) []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.drop, g.reply = drop, reply
}

func (g *fakeGateway) questions() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked
}

// says makes a reply with a code and addresses.
func says(code dnsmessage.RCode, ttl uint32, addrs ...string) func(dnsmessage.Message) []byte {
	return func(q dnsmessage.Message) []byte {
		q.Response, q.RCode = true, code
		for _, a := range addrs {
			q.Answers = append(q.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: ttl},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()},
			})
		}
		b, _ := q.Pack()
		return b
	}
}

var grantedNames = &wire.Names{
	Servers: []netip.Addr{netip.MustParseAddr("198.18.0.1")}, Exact: []string{"db.internal"}, Suffixes: []string{"svc.corp"},
	Services: []netip.Prefix{netip.MustParsePrefix("198.19.0.0/16")},
}

func TestLookup(t *testing.T) {
	g, r := newFakeGateway(t)
	if r.Covers("db.internal") {
		t.Error("a name is granted before there is a gateway")
	}
	if _, err := r.Lookup(t.Context(), "db.internal"); problem.CodeOf(err) != problem.FlowDenied {
		t.Errorf("before there is a gateway: %v", err)
	}
	r.Set(grantedNames)
	for name, tt := range map[string]struct {
		host  string
		reply func(dnsmessage.Message) []byte
		code  problem.Code // "" for an address
	}{
		"an address":          {"db.internal", says(0, 60, "198.19.0.7"), ""},
		"in capitals":         {"DB.Internal.", says(0, 60, "198.19.0.7"), ""},
		"under a wildcard":    {"a.svc.corp", says(0, 60, "198.19.0.7"), ""},
		"one of two":          {"b.svc.corp", says(0, 60, "10.0.0.1", "198.19.0.7"), ""},
		"not the gateway's":   {"c.svc.corp", says(0, 60, "10.0.0.1"), problem.FlowUnreachable},
		"nothing":             {"d.svc.corp", says(0, 60), problem.FlowUnreachable},
		"no such name":        {"e.svc.corp", says(dnsmessage.RCodeNameError, 0), problem.FlowUnreachable},
		"refused":             {"f.svc.corp", says(dnsmessage.RCodeRefused, 0), problem.FlowDenied},
		"trouble":             {"g.svc.corp", says(dnsmessage.RCodeServerFailure, 0), problem.FlowUnreachable},
		"outside the grant":   {"other.internal", says(0, 60, "198.19.0.7"), problem.FlowDenied},
		"the runner's own":    {"github.com", says(0, 60, "198.19.0.7"), problem.FlowDenied},
		"this host":           {"localhost", says(0, 60, "198.19.0.7"), problem.FlowDenied},
		"a domain's own apex": {"svc.corp", says(0, 60, "198.19.0.7"), problem.FlowDenied},
	} {
		g.set(0, tt.reply)
		r.Set(grantedNames) // forget the last one
		addr, err := r.Lookup(t.Context(), tt.host)
		if got := codeOf(err); got != tt.code || err == nil && addr.String() != "198.19.0.7" {
			t.Errorf("%s: %v, %v", name, addr, err)
		}
		if r.Covers(tt.host) != (tt.code != problem.FlowDenied || tt.host == "f.svc.corp") {
			t.Errorf("%s: covered %v", name, r.Covers(tt.host))
		}
	}
}

func codeOf(err error) problem.Code {
	if err == nil {
		return ""
	}
	return problem.CodeOf(err)
}

// What is lost is asked for again; what is no answer to the question is not taken for one.
func TestLookupWaits(t *testing.T) {
	g, r := newFakeGateway(t)
	r.Set(grantedNames)
	g.set(1, says(0, 60, "198.19.0.7"))
	if addr, err := r.Lookup(t.Context(), "db.internal"); err != nil || addr.String() != "198.19.0.7" {
		t.Errorf("after a loss: %v, %v", addr, err)
	}
	before := g.questions()
	if before < 2 {
		t.Errorf("%d questions, of which the first was lost", before)
	}
	if _, err := r.Lookup(t.Context(), "db.internal"); err != nil || g.questions() != before {
		t.Errorf("a known address is asked for again: %v", err)
	}
	r.Set(grantedNames)
	if _, err := r.Lookup(t.Context(), "db.internal"); err != nil || g.questions() == before {
		t.Errorf("another gateway is not asked: %v", err)
	}
	g.set(0, func(q dnsmessage.Message) []byte {
		q.ID++
		return says(0, 60, "198.19.0.9")(q)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if addr, err := r.Lookup(ctx, "x.svc.corp"); problem.CodeOf(err) != problem.Unreachable {
		t.Errorf("an answer to another question: %v, %v", addr, err)
	}
	down := NewResolver(func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no tunnel") })
	down.Set(grantedNames)
	if _, err := down.Lookup(t.Context(), "db.internal"); problem.CodeOf(err) != problem.Unreachable {
		t.Errorf("without a tunnel: %v", err)
	}
}

func TestResolverRefusesWhatIsTheRunners(t *testing.T) {
	_, r := newFakeGateway(t)
	n := *grantedNames
	n.Exact = []string{"db.internal", "github.com", "coordinator.example.com"}
	if refused := r.Set(&n); len(refused) != 2 || r.Covers("github.com") || r.Covers("coordinator.example.com") || !r.Covers("db.internal") {
		t.Errorf("refused %v", refused)
	}
	r.Set(nil)
	if r.Covers("db.internal") {
		t.Error("a session without names has some")
	}
}

// FuzzAnswer reads whatever a gateway may send.
func FuzzAnswer(f *testing.F) {
	var q dnsmessage.Message
	b, err := question(7, "db.internal")
	if err != nil || q.Unpack(b) != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(says(0, 60, "198.19.0.7", "10.0.0.1")(q))
	f.Add(says(dnsmessage.RCodeRefused, 0)(q))
	f.Add([]byte("\x00\x07\x80\x00\x00\x01\x00\x01\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01\xc0\x0c\x00\x01\x00\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parse(b, 7, "db.internal")
		if len(a.addrs) > maxAnswers || !ok && len(a.addrs) > 0 || a.ttl < 0 || a.ttl > time.Minute {
			t.Fatalf("%+v, %v", a, ok)
		}
	})
}
