package state

import (
	"cmp"
	"slices"
	"sync"
	"time"
	"unique"
)

// kind is what a key names.
type kind int

const (
	leaseKind kind = iota
	addressKind
	gatewayKind
	kinds int = iota
)

// record is a value of the bucket: a [Lease] (in the mirror, a *compact), a [holder] or a [presence].
type record interface {
	until() time.Time   // when it ends by its own word, whatever the bucket's clock says
	lasting() time.Time // until when a value that this one has replaced could still live
}

// entry is what the mirror knows of a key.
type entry struct {
	record     record // nil once the key is gone by our own doing and the watch has not caught up
	revision   uint64
	generation uint64 // of the watch that last confirmed it
}

// mirror is the bucket in memory. The watch feeds it, and this node's own writes do too, so that a node reads its own
// writes before the watch brings them back. Revisions order the two.
type mirror struct {
	mu         sync.RWMutex
	entries    [kinds]map[string]entry
	generation uint64
	seen       uint64                        // what the watch has brought; our own writes up to here are known already
	ahead      uint64                        // the first of our own writes that it has not; 0: none
	since      time.Time                     // when that was acknowledged
	stalled    time.Time                     // until when the watch was good, where it is not; see asOf
	held       map[unique.Handle[string]]int // leases that are not over, by gateway
	takers     map[string][]presence         // gateways that take sessions, by network, fewest sessions first; nil once one has changed
	holds      *holds                        // who holds which address, as leases say; nil where addresses have keys of their own

	ready     chan struct{} // closed once a first watch has brought everything
	readyOnce sync.Once
}

func newMirror() *mirror {
	m := &mirror{ready: make(chan struct{}), held: map[unique.Handle[string]]int{}}
	for k := range m.entries {
		m.entries[k] = map[string]entry{}
	}
	return m
}

// begin starts a new watch, which brings everything that there is once more.
func (m *mirror) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.generation++
	m.seen = 0
}

// behind is how long the watch has not brought a write of ours that was acknowledged.
func (m *mirror) behind(now time.Time) time.Duration {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.ahead == 0 {
		return 0
	}
	return now.Sub(m.since)
}

// stallFor bounds how long the mirror is taken for what it was when its watch broke.
const stallFor = time.Minute

// stall notes that the watch is no longer good, and until when it was.
func (m *mirror) stall(until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stalled.IsZero() {
		m.stalled = until
	}
}

// goesOn notes that the watch has brought all that its server has, and is good unless that server is behind.
func (m *mirror) goesOn() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ahead == 0 {
		m.stalled = time.Time{}
	}
}

// asOf is the time that the mirror shows: now, or when its watch broke. That gateways have not been heard of since then does not say that they
// are gone.
func (m *mirror) asOf(now time.Time) time.Time {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.stalled.IsZero() || now.Sub(m.stalled) > stallFor {
		return now
	}
	return m.stalled
}

// saw notes what the watch has brought; mu is held.
func (m *mirror) saw(revision uint64) {
	m.seen = max(m.seen, revision)
	if m.seen >= m.ahead {
		m.ahead = 0
	}
}

// settle ends a watch's first part: what it has not brought is gone, and given. Where the server that has the watch is behind, that says nothing of
// what is later than all that it has brought.
func (m *mirror) settle() (gone []record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, entries := range m.entries {
		for id, e := range entries {
			if e.generation != m.generation && (e.revision <= m.seen || m.seen == 0) {
				gone = append(gone, e.record)
				m.set(kind(k), id, nil)
			}
		}
	}
	m.stalled = time.Time{}
	m.readyOnce.Do(func() { close(m.ready) })
	return gone
}

// knows reports whether the watch need not decode a revision: the mirror has it or a later one. Only then does it count
// as seen: else this node's own write, coming in between, would be taken for known before it is there.
func (m *mirror) knows(k kind, id string, revision uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[k][id]
	if !ok || e.revision < revision {
		return false
	}
	m.saw(revision)
	e.generation = m.generation
	m.set(k, id, &e)
	return true
}

// watched takes what the watch brought; a nil record says that the key is gone. It gives the record that is gone by that.
func (m *mirror) watched(k kind, id string, r record, revision uint64) (gone record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saw(revision)
	switch old, ok := m.entries[k][id]; {
	case ok && old.revision > revision:
	case r == nil:
		m.set(k, id, nil)
		return old.record
	default:
		m.set(k, id, &entry{r, revision, m.generation})
	}
	return nil
}

// wrote takes this node's own write, or nil for its own removal.
func (m *mirror) wrote(k kind, id string, r record, revision uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if revision > m.seen && m.ahead == 0 {
		m.ahead, m.since = revision, time.Now()
	}
	if old, ok := m.entries[k][id]; revision <= m.seen || ok && old.revision >= revision {
		return
	}
	m.set(k, id, &entry{r, revision, m.generation})
}

// set replaces an entry, or deletes it where e is nil, and counts what gateways hold; mu is held.
func (m *mirror) set(k kind, id string, e *entry) {
	switch k {
	case leaseKind:
		m.count(m.entries[k][id].record, -1)
		m.hold(id, e)
	case gatewayKind:
		m.takers = nil
	}
	if e == nil {
		delete(m.entries[k], id)
		return
	}
	if k == leaseKind {
		m.count(e.record, 1)
	}
	m.entries[k][id] = *e
}

// hold has a lease say who holds its address, when it comes and when it goes; mu is held.
func (m *mirror) hold(id string, e *entry) {
	if m.holds == nil {
		return
	}
	if e != nil && e.record != nil {
		if c, at, ok := placed(e.record); ok {
			m.holds.note(at, id, nanos(c.lasting().Add(addressGrace)), e.revision)
		}
		return
	}
	old := m.entries[leaseKind][id]
	if _, at, ok := placed(old.record); ok {
		m.holds.drop(at, id, old.revision)
	}
}

// placed gives a lease and its address, where there is one.
func placed(r record) (c *compact, at spot, ok bool) {
	if c, ok = r.(*compact); ok {
		at, ok = c.spot()
	}
	return c, at, ok
}

func (m *mirror) count(r record, by int) {
	c, ok := r.(*compact)
	if !ok || c.over != unover {
		return
	}
	if m.held[c.gateway] += by; m.held[c.gateway] == 0 {
		delete(m.held, c.gateway)
	}
}

// unover is how a lease that is not over says so.
var unover = unique.Make("")

// heldBy counts the leases of a gateway that are not over.
func (m *mirror) heldBy(instance string) int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.held[unique.Make(instance)]
}

// takersOf gives the gateways of a network that take sessions, fewest sessions first, expired or not. They are not the caller's to
// change: every join asks for them.
func (m *mirror) takersOf(network string) []presence {
	m.mu.RLock()
	list, known := m.takers[network], m.takers != nil
	m.mu.RUnlock()
	if known {
		return list
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.takers = map[string][]presence{}
	for _, e := range m.entries[gatewayKind] {
		if p, ok := e.record.(presence); ok && !p.Leaving {
			m.takers[p.Network] = append(m.takers[p.Network], p)
		}
	}
	for _, list := range m.takers {
		slices.SortFunc(list, func(a, b presence) int {
			return cmp.Or(cmp.Compare(a.Sessions, b.Sessions), cmp.Compare(a.Instance, b.Instance))
		})
	}
	return m.takers[network]
}

// get gives a record that is there, expired or not, and its revision; nil and 0 where there is none.
func (m *mirror) get(k kind, id string) (record, uint64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	e := m.entries[k][id]
	return e.record, e.revision
}

// all gives the records of a kind that live at now.
func (m *mirror) all(k kind, now time.Time) []record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := make([]record, 0, len(m.entries[k]))
	for _, e := range m.entries[k] {
		if e.record != nil && now.Before(e.record.until()) {
			out = append(out, e.record)
		}
	}
	return out
}

// each calls f for the records of a kind that live at now; f must not call the mirror.
func (m *mirror) each(k kind, now time.Time, f func(record)) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, e := range m.entries[k] {
		if e.record != nil && now.Before(e.record.until()) {
			f(e.record)
		}
	}
}
