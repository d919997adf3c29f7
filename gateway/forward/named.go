package forward

import (
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// What the DNS server inside the tunnel asks of a session, see [names.Session].
var _ names.Session = (*Session)(nil)

// KnowsName tells whether the session may ask for a canonical name.
func (s *Session) KnowsName(name string) bool { return s.scope.Load().KnowsName(name) }

// ExactName tells whether a grant spells the name out.
func (s *Session) ExactName(name string) bool { return s.scope.Load().ExactName(name) }

// Book holds the session's service addresses. It is made when it is first asked for: most sessions use addresses alone.
func (s *Session) Book() *names.Book {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.theBook()
}

// theBook is Book with mu held. A job may bring an address that another gateway has given it.
func (s *Session) theBook() *names.Book {
	if s.book == nil {
		s.book = names.NewBook(s.f.ranges, s.f.limits.SessionNames)
		exact, _ := s.scope.Load().Names()
		s.book.Fix(exact)
	}
	return s.book
}

// serviceAddr gives the service address of a name that the session may ask for.
func (s *Session) serviceAddr(name string) (netip.Addr, bool) {
	if !s.KnowsName(name) {
		return netip.Addr{}, false
	}
	four, _, ok := s.Book().Lease(name, s.ExactName(name))
	return four, ok
}

// AwaitNames says that the job may bring service addresses of another gateway, of which [Session.Restore] will tell. Until then no word
// is said about those that are not known: the job asks again.
func (s *Session) AwaitNames() { s.awaits.Store(true) }

// Restore takes the names under wildcards that another gateway has given the job addresses for.
func (s *Session) Restore(named []wire.NamedAddr) {
	defer s.awaits.Store(false)
	for _, n := range named[:min(len(named), wire.MaxTakenNames)] {
		if name, ok := policy.CanonicalName(n.Name); ok && s.KnowsName(name) && !s.ExactName(name) {
			s.Book().Restore(name, n.Addr)
		}
	}
}

// TakeQuery takes a DNS question from the session's allowance.
func (s *Session) TakeQuery() bool {
	if s.queries.Allow() {
		return true
	}
	s.counts.limited.Add(1)
	return false
}

// TakeLookup takes one of the session's places for questions upstream.
func (s *Session) TakeLookup() (done func(), ok bool) {
	select {
	case s.lookups <- struct{}{}:
		return func() { <-s.lookups }, true
	default:
		return nil, false
	}
}

// TakeEcho takes a datagram to the gateway's own echo port from the session's allowance.
func (s *Session) TakeEcho() bool { return s.echoes.Allow() }

// NameRefused traces a name that the session asked for and may not have.
func (s *Session) NameRefused(name string) {
	s.counts.denied.Add(1)
	s.tell(wire.FlowRecord{
		Session: s.id, Proto: "dns", Name: name[:min(len(name), wire.MaxFlowName)], Verdict: wire.FlowRefused,
		Reason: "not granted by this name", Began: time.Now(), Count: 1,
	})
}
