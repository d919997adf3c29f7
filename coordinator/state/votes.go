package state

import (
	"encoding/binary"
	"sync"
)

// standing is who stands for leader in the latest term that was heard of, from the requests for votes that members send each other.
//
// Of three members of which one is lost both others must vote for the same. Where each stands at once, which on a disk that syncs slowly is no
// rarity, each has given its vote to itself, and by themselves they would try again after 4 to 9 s. That such an election comes to nothing can be told
// at once, and for certain.
type standing struct {
	mu   sync.Mutex
	term uint64
	who  map[string]struct{}
}

// heard takes a request for votes. Ours names a term as well, and nobody who could be elected.
func (s *standing) heard(b []byte) {
	term, who, ok := parseVoteRequest(b)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case term < s.term || term == 0: // ours, to learn the term
		return
	case term > s.term:
		s.term, s.who = term, map[string]struct{}{}
	}
	if who != candidate && len(s.who) < maxStanding {
		s.who[who] = struct{}{}
	}
}

// torn reports whether so many stand in the latest term, or a later one than that, that nobody can win: each has its own vote and at most those of the
// living who do not stand.
func (s *standing) torn(since uint64, members, living int) (term uint64, torn bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stand := len(s.who)
	return s.term, s.term >= since && stand > 1 && 1+max(0, living-stand) <= members/2
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
