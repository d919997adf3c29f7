package state

import (
	"cmp"
	"encoding/binary"
	"sync"
	"time"
)

// standing is who stands for leader in the latest term that was heard of, from the requests for votes that members send each other.
//
// Of three members of which one is lost both others must vote for the same. Where each stands at once, which on a disk that syncs slowly is no
// rarity, each has given its vote to itself, and by themselves they would try again after 4 to 9 s. That such an election comes to nothing can be told
// at once, and for certain.
type standing struct {
	mu    sync.Mutex
	term  uint64
	who   map[string]struct{}
	since time.Time     // when the term was first heard of; zero: before the last leader was elected
	news  chan struct{} // a word when somebody stands
	wait  time.Duration // for what comes of a term; 0: electionWait
}

// heard takes a request for votes. Ours names a term as well, and nobody who could be elected.
func (s *standing) heard(b []byte) {
	term, who, ok := parseVoteRequest(b)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if term < s.term || term == 0 { // ours, to learn the term
		return
	}
	s.move(term)
	if who != candidate && len(s.who) < maxStanding {
		s.who[who] = struct{}{}
	}
	select {
	case s.news <- struct{}{}:
	default: // one word is waiting already
	}
}

// move takes up a later term.
func (s *standing) move(term uint64) {
	if term > s.term {
		s.term, s.who, s.since = term, map[string]struct{}{}, time.Now()
	}
}

// saw takes a term that a member has told.
func (s *standing) saw(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.move(term)
}

// over says that the election, if there was one, is.
func (s *standing) over(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.move(term)
	s.since = time.Time{}
}

// comingTo is how long the election that is under way may still take; 0: there is none, or it has come to nothing. It has as long again when another
// term begins: who is refused because his log is behind has another member stand.
func (s *standing) comingTo() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, cmp.Or(s.wait, electionWait)-time.Since(s.since))
}

// somebody reports whether anybody stands in the latest term, and which that is.
func (s *standing) somebody() (term uint64, stands bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term, len(s.who) > 0
}

// latest is the latest term that was heard of.
func (s *standing) latest() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term
}

// next takes up the term after last, to ask for an election in, unless a later one than last has been heard of meanwhile.
func (s *standing) next(last uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.term > last {
		return false
	}
	s.move(last + 1)
	return true
}

// torn reports whether so many of the living stand in the latest term, and which that is, that nobody can win: each has its own vote and at most those of the living who do not
// stand. Who is cut off may stand as well, and neither has their votes nor takes them away.
func (s *standing) torn(members int, living map[string]bool) (term uint64, torn bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stand := 0
	for who := range s.who {
		if living[who] {
			stand++
		}
	}
	return s.term, stand > 1 && 1+len(living)-stand <= members/2
}

const (
	voteRequestSize = 24 + peerLength
	maxStanding     = 64 // candidates that are counted: a group has five members at most
)

// parseVoteRequest reads a member's request for votes: its term and who stands.
func parseVoteRequest(b []byte) (term uint64, who string, ok bool) {
	if len(b) != voteRequestSize {
		return 0, "", false
	}
	return binary.LittleEndian.Uint64(b), string(b[24:]), true
}
