package state

import (
	"sync"
	"time"
)

// kind is what a key names.
type kind int

const (
	leaseKind kind = iota
	addressKind
	gatewayKind
	kinds int = iota
)

// record is a value of the bucket: a [Lease], a [holder] or a [presence].
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
	seen       uint64 // what the watch has brought; our own writes up to here are known already

	ready     chan struct{} // closed once a first watch has brought everything
	readyOnce sync.Once
}

func newMirror() *mirror {
	m := &mirror{ready: make(chan struct{})}
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

// settle ends a watch's first part: what it has not brought is gone, and given.
func (m *mirror) settle() (gone []record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, entries := range m.entries {
		for id, e := range entries {
			if e.generation != m.generation {
				gone = append(gone, e.record)
				delete(entries, id)
			}
		}
	}
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
	m.seen = max(m.seen, revision)
	e.generation = m.generation
	m.entries[k][id] = e
	return true
}

// watched takes what the watch brought; a nil record says that the key is gone. It gives the record that is gone by that.
func (m *mirror) watched(k kind, id string, r record, revision uint64) (gone record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = max(m.seen, revision)
	switch old, ok := m.entries[k][id]; {
	case ok && old.revision > revision:
	case r == nil:
		delete(m.entries[k], id)
		return old.record
	default:
		m.entries[k][id] = entry{r, revision, m.generation}
	}
	return nil
}

// wrote takes this node's own write, or nil for its own removal.
func (m *mirror) wrote(k kind, id string, r record, revision uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if old, ok := m.entries[k][id]; revision <= m.seen || ok && old.revision >= revision {
		return
	}
	m.entries[k][id] = entry{r, revision, m.generation}
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
