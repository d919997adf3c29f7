package load

import (
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// live is the sessions that stand, in the order in which they renew.
type live struct {
	every time.Duration
	ids   io.Writer // nil for none

	mu        sync.Mutex
	byID      map[string]*session
	holders   map[netip.Addr]string // the session that an address was given to
	queue     []due                 // ordered by at
	clashes   int                   // addresses that two live sessions got
	lost      int                   // sessions that a coordinator said were over
	renewals  int
	renewErrs map[string]int
}

type due struct {
	s  *session
	at time.Time
}

func newLive(every time.Duration, ids io.Writer) *live {
	return &live{every: every, ids: ids, byID: map[string]*session{}, holders: map[netip.Addr]string{}, renewErrs: map[string]int{}}
}

// add takes a session up. Its first renewal is due at the given time, which must not be before that of those that are there.
func (l *live) add(s *session, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ids != nil {
		_, _ = io.WriteString(l.ids, s.id+"\n") // whoever compares misses it
	}
	if _, taken := l.holders[s.address]; taken {
		l.clashes++
	}
	l.byID[s.id], l.holders[s.address] = s, s.id
	l.queue = append(l.queue, due{s, at})
}

// remove forgets a session, and reports whether it was there.
func (l *live) remove(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.forget(id)
}

func (l *live) forget(id string) bool {
	s, ok := l.byID[id]
	if ok {
		delete(l.byID, id)
		if l.holders[s.address] == id {
			delete(l.holders, s.address)
		}
	}
	return ok
}

// lose notes that a session was ended that its job had not ended, by the gateway that carries it. One that was asked before another one
// was, in a join that was tried again, is told to let go of it as well.
func (l *live) lose(id string, gateway wire.Key) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.byID[id]; ok && s.gateway == gateway && l.forget(id) {
		l.lost++
	}
}

// next gives the sessions that are due by now, and puts them at the end of the queue.
func (l *live) next(now time.Time) (out []*session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) > 0 && !l.queue[0].at.After(now) {
		d := l.queue[0]
		l.queue = l.queue[1:]
		if l.byID[d.s.id] == d.s {
			out = append(out, d.s)
			l.queue = append(l.queue, due{d.s, now.Add(l.every)})
		}
	}
	return out
}

// spread has the first renewals of all sessions that stand fall evenly into one round.
func (l *live) spread(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.queue {
		l.queue[i].at = now.Add(l.every * time.Duration(i+1) / time.Duration(len(l.queue)))
	}
}

// dueBefore gives the sessions that renew before a time.
func (l *live) dueBefore(at time.Time) (out []*session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.queue {
		if d.at.After(at) {
			break
		}
		out = append(out, d.s)
	}
	return out
}

// renewed counts a renewal, or why there was none.
func (l *live) renewed(s *session, code string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if code != "" {
		l.renewErrs[code]++
		return
	}
	l.renewals++
	s.renewed = time.Now()
}

// sample gives up to n sessions, from all over the queue.
func (l *live) sample(n int) (out []*session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	step := max(len(l.queue)/max(n, 1), 1)
	for i := 0; i < len(l.queue) && len(out) < n; i += step {
		if s := l.queue[i].s; l.byID[s.id] == s {
			out = append(out, s)
		}
	}
	return out
}
