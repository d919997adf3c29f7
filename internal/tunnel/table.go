package tunnel

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
)

// table maps remote addresses to the paths from which authentic checks have come. Receive goroutines look up in it for
// every packet, without a lock; a change copies one of its shards.
type table struct {
	shards [tableShards]struct {
		mu sync.Mutex
		m  atomic.Pointer[map[netip.AddrPort]*path]
	}
}

const tableShards = 256

func shardOf(a netip.AddrPort) uint8 {
	b := a.Addr().As16()
	h := binary.LittleEndian.Uint32(b[12:]) ^ uint32(a.Port())*0x9e3779b1
	return uint8(h ^ h>>8 ^ h>>16 ^ h>>24)
}

// lookup gives the path of an address, or nil.
func (t *table) lookup(a netip.AddrPort) *path {
	m := t.shards[shardOf(a)].m.Load()
	if m == nil {
		return nil
	}
	return (*m)[a]
}

// put makes p the path of its address. A path that is not validated never displaces one of another peer that is: whoever
// can only forge a source address takes nothing away.
func (t *table) put(p *path) {
	t.change(p.remote, func(m map[netip.AddrPort]*path) {
		old := m[p.remote]
		if old == p || old != nil && old.open.Load() && !p.open.Load() {
			return
		}
		if old != nil {
			old.gone.Store(true)
		}
		p.gone.Store(false)
		m[p.remote] = p
	})
}

// drop forgets p, unless its address has gone to another path.
func (t *table) drop(p *path) {
	t.change(p.remote, func(m map[netip.AddrPort]*path) {
		if m[p.remote] == p {
			delete(m, p.remote)
		}
	})
	p.gone.Store(true)
}

func (t *table) change(a netip.AddrPort, edit func(map[netip.AddrPort]*path)) {
	s := &t.shards[shardOf(a)]
	s.mu.Lock()
	defer s.mu.Unlock()
	m := map[netip.AddrPort]*path{}
	if old := s.m.Load(); old != nil {
		m = maps.Clone(*old)
	}
	edit(m)
	s.m.Store(&m)
}
