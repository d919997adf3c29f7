package portmap

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

var (
	routerAddr = netip.MustParseAddr("192.168.1.1")
	selfAddr   = netip.MustParseAddr("192.168.1.10")
	publicAddr = netip.MustParseAddr("203.0.113.7")
)

// router is a scripted router and the method to ask it.
type router struct {
	mu       sync.Mutex
	external netip.Addr
	port     uint16 // given out
	lifetime time.Duration
	err      error // of adding and verifying
	mapped   bool
	adds     int
	verifies int
	removes  int
	wishes   []uint16
}

func (*router) name() string { return "test" }

func (r *router) add(_ context.Context, q request) (mapping, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.adds++
	r.wishes = append(r.wishes, q.wish())
	if r.err != nil {
		return mapping{}, r.err
	}
	r.mapped = true
	return mapping{netip.AddrPortFrom(r.external, r.port), r.lifetime}, nil
}

func (r *router) verify(_ context.Context, _ request, m mapping) (mapping, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.verifies++
	if r.err != nil || !r.mapped {
		return mapping{}, errors.Join(r.err, errors.New("no such mapping"))
	}
	return mapping{netip.AddrPortFrom(r.external, m.external.Port()), r.lifetime}, nil
}

func (r *router) remove(context.Context, request, mapping) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removes++
	r.mapped = false
	return nil
}

func (r *router) change(f func(*router)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r)
}

func (r *router) counts() (adds, verifies, removes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.adds, r.verifies, r.removes
}

// house is a manager in a bubble, and what its gateway has heard.
type house struct {
	*testing.T
	m       *Manager
	stop    context.CancelFunc
	mu      sync.Mutex
	changes []netip.AddrPort
	route   func() (netip.Addr, netip.Addr, error)
	asked   int // discoveries
	methods []method
}

// living runs f beside a manager that finds the methods, and ends it.
func living(t *testing.T, methods []method, f func(h *house)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &house{T: t, methods: methods, route: func() (netip.Addr, netip.Addr, error) { return routerAddr, selfAddr, nil }}
		var err error
		h.m, err = New(Options{
			Port: 51820,
			Route: func() (netip.Addr, netip.Addr, error) {
				h.mu.Lock()
				defer h.mu.Unlock()
				return h.route()
			},
			OnChange: func() {
				c, ok := h.m.Candidate()
				if ok != c.Addr.IsValid() || c.Kind != wire.Mapped {
					t.Errorf("candidate %v, %v", c, ok)
				}
				h.mu.Lock()
				defer h.mu.Unlock()
				h.changes = append(h.changes, c.Addr)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		h.m.discover = func(context.Context, netip.Addr, netip.Addr) []method {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.asked++
			return h.methods
		}
		ctx, stop := context.WithCancel(t.Context())
		h.stop = stop
		done := make(chan struct{})
		go func() { defer close(done); h.m.Run(ctx) }()
		synctest.Wait()
		f(h)
		stop()
		<-done
		if c, ok := h.m.Candidate(); ok {
			t.Errorf("%v is a candidate after the end", c)
		}
	})
}

// heard fails the test unless these addresses were published, in order; an empty string is the end of one.
func (h *house) heard(want ...string) {
	h.Helper()
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	var got []string
	for _, a := range h.changes {
		if a.IsValid() {
			got = append(got, a.String())
		} else {
			got = append(got, "")
		}
	}
	if len(got) != len(want) {
		h.Fatalf("heard %q, want %q", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			h.Fatalf("heard %q, want %q", got, want)
		}
	}
}

func (h *house) moveTo(route func() (netip.Addr, netip.Addr, error)) {
	h.mu.Lock()
	h.route = route
	h.mu.Unlock()
	h.m.Refresh()
}

func (h *house) discoveries() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asked
}

func TestManagerMapsRenewsAndRemoves(t *testing.T) {
	r := &router{external: publicAddr, port: 51820, lifetime: 20 * time.Minute}
	living(t, []method{r}, func(h *house) {
		h.heard("203.0.113.7:51820")
		time.Sleep(9 * time.Minute)
		if adds, verifies, _ := r.counts(); adds != 1 || verifies != 4 {
			t.Errorf("%d adds and %d verifies in 9 minutes", adds, verifies)
		}
		time.Sleep(90 * time.Second)
		if adds, _, _ := r.counts(); adds != 2 {
			t.Errorf("%d adds after half of the lifetime", adds)
		}
		time.Sleep(5 * time.Hour)
		h.heard("203.0.113.7:51820")
		h.stop()
		h.heard("203.0.113.7:51820", "")
		if _, _, removes := r.counts(); removes != 1 {
			t.Errorf("%d removes", removes)
		}
	})
}

// What nobody on the internet can reach is no candidate, and is given back.
func TestManagerRefusesUselessAddresses(t *testing.T) {
	for _, external := range []string{"192.168.0.2", "10.0.0.1", "100.64.3.4", "172.16.9.9", "169.254.1.1", "127.0.0.1", "0.0.0.0", "224.0.0.1", "198.18.0.1", "2001:db8::1"} {
		r := &router{external: netip.MustParseAddr(external), port: 51820, lifetime: time.Hour}
		living(t, []method{r}, func(h *house) {
			h.heard()
			if adds, _, removes := r.counts(); adds != 1 || removes != 1 {
				t.Errorf("%s: %d adds, %d removes", external, adds, removes)
			}
			time.Sleep(9 * time.Minute)
			if adds, _, _ := r.counts(); adds != 1 {
				t.Errorf("%s: asked again before its time", external)
			}
			r.change(func(r *router) { r.external = publicAddr })
			time.Sleep(2 * time.Minute)
			h.heard("203.0.113.7:51820")
		})
	}
	r := &router{external: publicAddr, port: 0, lifetime: time.Hour}
	living(t, []method{r}, func(h *house) { h.heard() })
}

func TestManagerTakesTheNextMethod(t *testing.T) {
	refuses := &router{err: errors.New("no")}
	private := &router{external: selfAddr, port: 51820}
	good := &router{external: publicAddr, port: 4000, lifetime: time.Hour}
	living(t, []method{refuses, private, good}, func(h *house) { h.heard("203.0.113.7:4000") })
}

// A router that restarts and forgets is asked for the same port again.
func TestManagerSurvivesARestart(t *testing.T) {
	r := &router{external: publicAddr, port: 4000, lifetime: time.Hour}
	living(t, []method{r}, func(h *house) {
		r.change(func(r *router) { r.mapped = false })
		time.Sleep(3 * time.Minute)
		h.heard("203.0.113.7:4000")
		if adds, _, _ := r.counts(); adds != 2 || r.wishes[0] != 51820 || r.wishes[1] != 4000 {
			t.Errorf("%d adds, wishes %v", adds, r.wishes)
		}
		r.change(func(r *router) { r.external, r.port = netip.MustParseAddr("203.0.113.8"), 4001 })
		time.Sleep(3 * time.Minute)
		h.heard("203.0.113.7:4000", "203.0.113.8:4001")
	})
}

func TestManagerGivesUpALostRouter(t *testing.T) {
	r := &router{external: publicAddr, port: 4000, lifetime: time.Hour}
	living(t, []method{r}, func(h *house) {
		r.change(func(r *router) { r.err = errors.New("silence") })
		time.Sleep(3 * time.Minute)
		h.heard("203.0.113.7:4000", "")
		if n := h.discoveries(); n != 2 {
			t.Errorf("%d discoveries", n)
		}
		r.change(func(r *router) { r.err = nil })
		h.m.Refresh()
		h.heard("203.0.113.7:4000", "", "203.0.113.7:4000")
	})
}

// One lost answer is no reason to drop anything.
func TestManagerForgivesOneFailure(t *testing.T) {
	r := &router{external: publicAddr, port: 4000, lifetime: time.Hour}
	living(t, []method{r}, func(h *house) {
		time.Sleep(119 * time.Second)
		r.change(func(r *router) { r.err = errors.New("silence") })
		time.Sleep(2 * time.Second)
		r.change(func(r *router) { r.err = nil })
		time.Sleep(time.Hour)
		h.heard("203.0.113.7:4000")
	})
}

func TestManagerFollowsTheNetwork(t *testing.T) {
	r := &router{external: publicAddr, port: 4000, lifetime: time.Hour}
	living(t, []method{r}, func(h *house) {
		h.moveTo(h.route) // nothing has changed: the mapping stays, and is looked at
		synctest.Wait()
		if _, verifies, _ := r.counts(); verifies != 1 || h.discoveries() != 1 {
			t.Errorf("%d verifies, %d discoveries", verifies, h.discoveries())
		}
		h.moveTo(func() (netip.Addr, netip.Addr, error) { return netip.Addr{}, netip.Addr{}, errors.New("no route") })
		h.heard("203.0.113.7:4000", "")
		if _, _, removes := r.counts(); removes != 0 {
			t.Error("asked a router that cannot be reached")
		}
		h.moveTo(func() (netip.Addr, netip.Addr, error) { return routerAddr, netip.MustParseAddr("192.168.1.11"), nil })
		h.heard("203.0.113.7:4000", "", "203.0.113.7:4000")
		h.moveTo(func() (netip.Addr, netip.Addr, error) { return routerAddr, publicAddr, nil })
		h.heard("203.0.113.7:4000", "", "203.0.113.7:4000", "")
		if n := h.discoveries(); n != 2 {
			t.Errorf("%d discoveries: a public address needs none", n)
		}
	})
}

// Whatever lifetime a router names, it is asked neither all the time nor too late.
func TestManagerPacesItself(t *testing.T) {
	for name, c := range map[string]struct {
		lifetime time.Duration
		most     int // requests in an hour
	}{
		"no time at all": {time.Nanosecond, 721},
		"a second":       {time.Second, 721},
		"for good":       {0, 31},
		"a century":      {100 * 365 * 24 * time.Hour, 31},
	} {
		t.Run(name, func(t *testing.T) {
			r := &router{external: publicAddr, port: 4000, lifetime: c.lifetime}
			living(t, []method{r}, func(*house) {
				time.Sleep(time.Hour)
				if adds, verifies, _ := r.counts(); adds+verifies > c.most || adds < 6 {
					t.Errorf("%d adds and %d verifies in an hour", adds, verifies)
				}
			})
		})
	}
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"no port":        {},
		"short lifetime": {Port: 1, Lifetime: time.Second},
		"negative check": {Port: 1, Check: -1},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestRoutable(t *testing.T) {
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "203.0.113.7": true, "100.63.255.255": true, "100.128.0.0": true, "172.32.0.1": true, "223.255.255.255": true,
		"100.64.0.1": false, "172.31.255.255": false, "240.0.0.1": false, "255.255.255.255": false, "2001:db8::1": false,
	} {
		if got := Routable(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
	if Routable(netip.Addr{}) {
		t.Error("no address is one")
	}
}
