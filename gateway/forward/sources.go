package forward

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
)

// sources leads from a source address to its session. It is read for every batch of packets without a lock; a change copies
// one shard, so that its cost does not grow with the sessions by more than a 256th.
type sources struct {
	shards [sourceShards]struct {
		mu sync.Mutex
		m  atomic.Pointer[map[netip.Addr]*Session]
	}
}

const sourceShards = 256

func sourceShard(a netip.Addr) uint8 {
	b := a.As16()
	h := binary.LittleEndian.Uint32(b[12:]) * 0x9e3779b1
	return uint8(h >> 24)
}

// find gives the session of an address, or nil.
func (t *sources) find(a netip.Addr) *Session {
	m := t.shards[sourceShard(a)].m.Load()
	if m == nil {
		return nil
	}
	return (*m)[a]
}

// add leads all of a session's addresses to it, or none where one is taken.
func (t *sources) add(s *Session) error {
	for i, a := range s.addrs {
		if !t.put(a, s) {
			for _, b := range s.addrs[:i] {
				t.drop(b, s)
			}
			return fmt.Errorf("address %v of session %s is in use", a, s.id)
		}
	}
	return nil
}

// remove takes a session's addresses out.
func (t *sources) remove(s *Session) {
	for _, a := range s.addrs {
		t.drop(a, s)
	}
}

func (t *sources) put(a netip.Addr, s *Session) (ok bool) {
	t.change(a, func(m map[netip.Addr]*Session) {
		if ok = m[a] == nil; ok {
			m[a] = s
		}
	})
	return ok
}

func (t *sources) drop(a netip.Addr, s *Session) {
	t.change(a, func(m map[netip.Addr]*Session) {
		if m[a] == s {
			delete(m, a)
		}
	})
}

func (t *sources) change(a netip.Addr, edit func(map[netip.Addr]*Session)) {
	shard := &t.shards[sourceShard(a)]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	m := map[netip.Addr]*Session{}
	if old := shard.m.Load(); old != nil {
		m = maps.Clone(*old)
	}
	edit(m)
	shard.m.Store(&m)
}
