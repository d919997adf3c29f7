package tunnel

import (
	"encoding/binary"
	"maps"
	"sync"
	"sync/atomic"
)

// table maps spots to the paths from which authentic checks have come. Receive goroutines look up in it for
// every packet, without a lock; a change copies one of its shards.
type table struct {
	shards [tableShards]struct {
		mu sync.Mutex
		m  atomic.Pointer[map[spot]*path]
	}
}

const tableShards = 256

func shardOf(s spot) uint8 {
	var b [16]byte
	if s.remote.IsValid() {
		b = s.remote.Addr().As16()
	}
	h := (binary.LittleEndian.Uint32(b[12:]) ^ s.header) + uint32(s.remote.Port())
	return uint8(h * 0x9e3779b1 >> 24)
}

// lookup gives the path of a spot, or nil.
func (t *table) lookup(s spot) *path {
	m := t.shards[shardOf(s)].m.Load()
	if m == nil {
		return nil
	}
	return (*m)[s]
}

// put makes p the path of its spot. A path that is not validated never displaces one of another peer that is: whoever
// can only forge a source address takes nothing away.
func (t *table) put(p *path) {
	t.change(p.spot, func(m map[spot]*path) {
		old := m[p.spot]
		if old == p || old != nil && old.open.Load() && !p.open.Load() {
			return
		}
		if old != nil {
			old.gone.Store(true)
		}
		p.gone.Store(false)
		m[p.spot] = p
	})
}

// drop forgets p, unless its spot has gone to another path.
func (t *table) drop(p *path) {
	t.change(p.spot, func(m map[spot]*path) {
		if m[p.spot] == p {
			delete(m, p.spot)
		}
	})
	p.gone.Store(true)
}

func (t *table) change(at spot, edit func(map[spot]*path)) {
	s := &t.shards[shardOf(at)]
	s.mu.Lock()
	defer s.mu.Unlock()
	m := map[spot]*path{}
	if old := s.m.Load(); old != nil {
		m = maps.Clone(*old)
	}
	edit(m)
	s.m.Store(&m)
}
