package state

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// model is what the store should say, kept in two maps.
type model struct {
	clock  *clock
	dir    string
	store  *Store
	pool   Pool
	leases map[string]Lease  // by session, ended ones removed, expired ones not
	held   map[string]holder // by network and address
	n      int               // directories made by crashes
	root   string
}

const modelSessions = 12 // for a pool of 5, so that it fills up

func drawSession(t *rapid.T) string {
	return fmt.Sprint("s", rapid.IntRange(0, modelSessions-1).Draw(t, "session"))
}

func (m *model) live(session string) (Lease, bool) {
	l, ok := m.leases[session]
	return l, ok && m.clock.now().Before(l.Expires)
}

// heldBy gives who holds an address now.
func (m *model) heldBy(l Lease) string {
	h, ok := m.held[addressID(l.Network, l.Addresses[0])]
	if !ok || !m.clock.now().Before(h.Expires) {
		return ""
	}
	return h.Session
}

func (m *model) remember(l Lease) {
	m.leases[l.Session] = l
	m.hold(l)
}

// hold has an address held for a lease's session, and never for shorter than it was.
func (m *model) hold(l Lease) {
	id := addressID(l.Network, l.Addresses[0])
	if h, old := holderOf(l), m.held[id]; old.Session != l.Session || h.Expires.After(old.Expires) {
		m.held[id] = h
	}
}

func (m *model) free() int {
	n := m.pool.Size()
	for _, h := range m.held {
		if m.clock.now().Before(h.Expires) {
			n--
		}
	}
	return n
}

func (m *model) create(t *rapid.T) {
	l := testLease(drawSession(t), m.clock.now())
	l.Expires = m.clock.now().Add(time.Duration(rapid.IntRange(1, 100).Draw(t, "seconds")) * time.Second)
	got, err := m.store.CreateLease(t.Context(), l, m.pool)
	_, exists := m.live(l.Session)
	switch {
	case exists:
		if !errors.Is(err, ErrExists) {
			t.Fatalf("%s has a lease, create gives %v", l.Session, err)
		}
	case m.free() == 0:
		if !errors.Is(err, ErrFull) {
			t.Fatalf("no address is free, create gives %v, %v", got.Addresses, err)
		}
	case err != nil:
		t.Fatalf("%d addresses are free, create gives %v", m.free(), err)
	case m.heldBy(got) != "" || !m.pool.Holds(got.Addresses):
		t.Fatalf("%s gets %v, which is held by %q", l.Session, got.Addresses, m.heldBy(got))
	default:
		m.remember(got)
	}
}

func (m *model) adopt(t *rapid.T) {
	l := testLease(drawSession(t), m.clock.now())
	l.Addresses = m.pool.Addresses(rapid.IntRange(0, m.pool.Size()-1).Draw(t, "address"))
	l.Expires = m.clock.now().Add(time.Duration(rapid.IntRange(1, 100).Draw(t, "seconds")) * time.Second)
	got, err := m.store.AdoptLease(t.Context(), l)
	by := m.heldBy(l)
	if _, exists := m.live(l.Session); exists || by != "" && by != l.Session {
		if !errors.Is(err, ErrExists) {
			t.Fatalf("%s has a lease (%v) or %v is held by %q, adopt gives %v", l.Session, exists, l.Addresses, by, err)
		}
		return
	}
	if err != nil {
		t.Fatalf("adopt: %v", err)
	}
	m.remember(got)
}

func (m *model) update(t *rapid.T) {
	session := drawSession(t)
	old, exists := m.live(session)
	if !exists {
		return
	}
	l := old
	l.Gateway = "gw"
	l.Expires = m.clock.now().Add(time.Duration(rapid.IntRange(1, 100).Draw(t, "seconds")) * time.Second)
	stale := rapid.Bool().Draw(t, "stale")
	if stale {
		l.Revision--
	}
	got, err := m.store.UpdateLease(t.Context(), l)
	switch {
	case stale && !errors.Is(err, ErrConflict):
		t.Fatalf("an update of an old revision gives %v", err)
	case !stale && err != nil:
		t.Fatalf("update: %v", err)
	case !stale:
		m.remember(got)
	}
}

func (m *model) end(t *rapid.T) {
	session := drawSession(t)
	if err := m.store.EndLease(t.Context(), session); err != nil {
		t.Fatalf("end: %v", err)
	}
	if l, ok := m.leases[session]; ok {
		delete(m.leases, session)
		if id := addressID(l.Network, l.Addresses[0]); m.held[id].Session == session {
			delete(m.held, id)
		}
	}
}

func (m *model) expire(t *rapid.T) {
	m.clock.turn(time.Duration(rapid.IntRange(1, 30).Draw(t, "seconds")) * time.Second)
}

// crash opens a copy of the directory as it is while the server runs, which is what kill -9 leaves.
func (m *model) crash(t *rapid.T) {
	if rapid.IntRange(0, 2).Draw(t, "rarely") != 0 { // it costs as much as all else
		return
	}
	m.n++
	next := filepath.Join(m.root, fmt.Sprint(m.n))
	if err := copyDir(next, m.dir); err != nil {
		t.Fatal(err)
	}
	if err := m.store.Close(); err != nil {
		t.Fatal(err)
	}
	m.open(t, next)
	m.read(t)
}

func (m *model) open(t *rapid.T, dir string) {
	s, err := Open(t.Context(), Options{Dir: dir, Logger: quiet, now: m.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	m.store, m.dir = s, dir
}

// copyDir copies a directory whose files may be appended to meanwhile.
func copyDir(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		data, err := os.ReadFile(path) //nolint:gosec // in the test's own directory
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o600)
	})
}

// check compares what the node lists, and sees that no two live leases share an address.
func (m *model) check(t *rapid.T) {
	seen := map[netip.Addr]string{}
	count := 0
	for got := range m.store.Leases {
		want, exists := m.live(got.Session)
		if !exists || !alike(got, want) {
			t.Fatalf("lists %+v, want %+v (%v)", got, want, exists)
		}
		if other, ok := seen[got.Addresses[0]]; ok {
			t.Fatalf("%s and %s share %v", got.Session, other, got.Addresses)
		}
		seen[got.Addresses[0]] = got.Session
		count++
	}
	for session := range m.leases {
		if _, exists := m.live(session); exists {
			count--
		}
	}
	if count != 0 {
		t.Fatalf("lists %q, which is %+d", leases(m.store), count)
	}
}

// read compares what the bucket holds.
func (m *model) read(t *rapid.T) {
	for i := range modelSessions {
		session := fmt.Sprint("s", i)
		want, exists := m.live(session)
		got, err := m.store.Lease(t.Context(), session)
		if exists && (err != nil || !alike(got, want)) || !exists && !errors.Is(err, ErrNotFound) {
			t.Fatalf("%s is %+v (%v), want %+v (%v)", session, got, err, want, exists)
		}
	}
}

func alike(a, b Lease) bool {
	return a.Session == b.Session && a.Revision == b.Revision && a.Gateway == b.Gateway &&
		slices.Equal(a.Addresses, b.Addresses) && a.Expires.Equal(b.Expires)
}

func TestStoreKeepsToItsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		root, err := os.MkdirTemp("", "culvert-model-")
		if err != nil {
			t.Fatal(err)
		}
		m := &model{
			clock: newClock(), root: root, pool: Pool{V4: netip.MustParsePrefix("10.9.0.0/29")},
			leases: map[string]Lease{}, held: map[string]holder{},
		}
		m.open(t, filepath.Join(root, "0"))
		defer func() {
			_ = m.store.Close()
			_ = os.RemoveAll(root)
		}()
		t.Repeat(map[string]func(*rapid.T){
			"create": m.create, "create more": m.create, "create yet more": m.create, "adopt": m.adopt, "update": m.update, "end": m.end,
			"expire": m.expire, "crash": m.crash, "": m.check,
		})
		m.read(t)
	})
}
