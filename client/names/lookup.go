package names

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	lookupLimit = 5 * time.Second        // for one name
	firstTry    = 400 * time.Millisecond // a gateway takes 300 ms at most to find out that a name does not exist
	maxAnswer   = 1232                   // bytes
	maxCache    = 1024                   // names
	maxAnswers  = 16                     // records that are looked at
)

// Resolver looks granted names up for this program itself: at the gateway, through the tunnel. It asks for no other names, and
// believes no address outside the range that services have theirs from. It is safe for concurrent use.
type Resolver struct {
	// OnAddress, set before use, is told each address that the gateway's servers give to a name under a wildcard, before whoever asked is.
	// It is called in the packet path.
	OnAddress func(netip.Addr)

	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	reserved []string

	mu    sync.Mutex
	scope *scope // nil where nothing is granted
	cache map[string]cached
	heard []wire.NamedAddr // see [Resolver.Heard]
}

type cached struct {
	addr    netip.Addr
	expires time.Time
}

// NewResolver makes a resolver that dials through the tunnel. Nothing is granted yet. reserved is as in [Options].
func NewResolver(dial func(ctx context.Context, network, address string) (net.Conn, error), reserved ...string) *Resolver {
	return &Resolver{dial: dial, reserved: reserved, cache: map[string]cached{}}
}

// Set takes what a gateway grants, nil for nothing, in place of what the one before did. Names that the runner itself lives on
// are left out; it tells which.
func (r *Resolver) Set(n *wire.Names) (refused []string) {
	var s *scope
	if n != nil && len(n.Servers) > 0 {
		s, refused = newScope(*n, r.reserved)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.scope = s
	clear(r.cache) // another gateway may have another address for a name
	return refused
}

// Covers tells whether a host name is granted, so that it has to be asked for here and nowhere else.
func (r *Resolver) Covers(host string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.scope != nil && r.scope.covers(host)
}

// Lookup gives the service address of a granted name. Errors are *problem.Error.
func (r *Resolver) Lookup(ctx context.Context, host string) (netip.Addr, error) {
	name := canonical(host)
	r.mu.Lock()
	scope, known := r.scope, r.cache[name]
	r.mu.Unlock()
	if scope == nil || !scope.covers(name) {
		return netip.Addr{}, notGranted(host)
	}
	if time.Now().Before(known.expires) {
		return known.addr, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	addr, ttl, err := r.ask(ctx, scope, name)
	if err != nil {
		return netip.Addr{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cache) >= maxCache {
		clear(r.cache)
	}
	if r.scope == scope {
		r.cache[name] = cached{addr, time.Now().Add(ttl)}
	}
	return addr, nil
}

func notGranted(host string) error {
	return problem.New(problem.FlowDenied, fmt.Sprintf("the grant holds no name %s", host),
		"`culvert status` shows the names; ask for a rule that allows this one")
}

// ask sends a question until it is answered: datagrams get lost, most of all the first ones of a tunnel.
func (r *Resolver) ask(ctx context.Context, s *scope, name string) (netip.Addr, time.Duration, error) {
	silent := func(err error) error {
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the gateway does not say what %s is", name),
			"the tunnel looks for another path or gateway by itself; `culvert status` shows what it is doing")
	}
	conn, err := r.dial(ctx, "udp", netip.AddrPortFrom(s.servers[0], wire.DNSPort).String())
	if err != nil {
		return netip.Addr{}, 0, silent(err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	id := uint16(rand.Uint32())
	question, err := question(id, name)
	if err != nil {
		return netip.Addr{}, 0, silent(err)
	}
	for wait := firstTry; ctx.Err() == nil; wait *= 2 {
		until := time.Now().Add(wait)
		_, _ = conn.Write(question) // what does not go out is not answered
		if a, ok := read(conn, until, id, name); ok {
			return s.judge(a, name)
		}
		select {
		case <-time.After(time.Until(until)): // after an error that is no timeout
		case <-ctx.Done():
		}
	}
	return netip.Addr{}, 0, silent(context.Cause(ctx))
}

// read waits for the answer to a question.
func read(conn net.Conn, until time.Time, id uint16, name string) (answer, bool) {
	_ = conn.SetReadDeadline(until)
	buf := make([]byte, maxAnswer)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return answer{}, false
		}
		if a, ok := parse(buf[:n], id, name); ok {
			return a, true
		}
	}
}

// answer is what a gateway says of a name.
type answer struct {
	code  dnsmessage.RCode
	addrs []netip.Addr
	ttl   time.Duration
}

// judge takes an address that can be a service's out of an answer.
func (s *scope) judge(a answer, name string) (netip.Addr, time.Duration, error) {
	switch a.code {
	case dnsmessage.RCodeRefused:
		return netip.Addr{}, 0, notGranted(name)
	case dnsmessage.RCodeNameError:
		return netip.Addr{}, 0, problem.New(problem.FlowUnreachable, fmt.Sprintf("the name %s is granted, but does not exist behind the gateway", name),
			"check its spelling, and the DNS that the gateway uses")
	case dnsmessage.RCodeSuccess:
	default:
		return netip.Addr{}, 0, problem.New(problem.FlowUnreachable, fmt.Sprintf("the gateway has no address for %s", name),
			"a session may use a bounded number of names under wildcards; grant this one by its full name")
	}
	for _, addr := range a.addrs {
		if s.believable(addr) {
			return addr, a.ttl, nil
		}
	}
	return netip.Addr{}, 0, problem.New(problem.FlowUnreachable, fmt.Sprintf("the name %s is granted, but has no address behind the gateway", name),
		"check its records in the DNS that the gateway uses")
}

// question makes a query for a name's IPv4 address (RFC 1035, section 4).
func question(id uint16, name string) ([]byte, error) {
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	return m.Pack()
}

// parse reads the answer to a question; false for anything else.
func parse(b []byte, id uint16, name string) (a answer, ok bool) {
	var p dnsmessage.Parser
	head, err := p.Start(b)
	if err != nil || head.ID != id || !head.Response {
		return a, false
	}
	q, err := p.Question()
	if err != nil || canonical(q.Name.String()) != name || q.Type != dnsmessage.TypeA || q.Class != dnsmessage.ClassINET {
		return a, false
	}
	if p.SkipAllQuestions() != nil {
		return a, false
	}
	a = answer{code: head.RCode, ttl: time.Minute}
	for range maxAnswers {
		h, err := p.AnswerHeader()
		if err != nil {
			break
		}
		if h.Type != dnsmessage.TypeA || h.Class != dnsmessage.ClassINET || canonical(h.Name.String()) != name {
			if p.SkipAnswer() != nil {
				break
			}
			continue
		}
		rr, err := p.AResource()
		if err != nil {
			break
		}
		a.addrs = append(a.addrs, netip.AddrFrom4(rr.A))
		a.ttl = min(a.ttl, time.Duration(h.TTL)*time.Second)
	}
	return a, true
}
