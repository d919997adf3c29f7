package nat

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// scripted is a network that a test changes.
type scripted struct {
	news  chan struct{}
	done  chan struct{}
	mu    sync.Mutex
	now   Network
	err   error
	reads int
}

func newScripted(addrs ...string) *scripted {
	s := &scripted{news: make(chan struct{}), done: make(chan struct{})}
	s.set(addrs...)
	return s
}

func (s *scripted) set(addrs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = Network{}
	for _, a := range addrs {
		s.now.Addrs = append(s.now.Addrs, netip.MustParseAddr(a))
	}
	s.now = s.now.sorted()
}

func (s *scripted) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *scripted) read() (Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	return s.now, s.err
}

func (s *scripted) looked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reads
}

func (s *scripted) wait() error {
	select {
	case <-s.news:
		return nil
	case <-s.done:
		return net.ErrClosed
	}
}

func (s *scripted) close() { close(s.done) }

// watching runs f beside a watcher of s, in a bubble, and checks that the watcher ends.
func watching(t *testing.T, s *scripted, f func(changes <-chan Change)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s.news, s.done = make(chan struct{}), make(chan struct{})
		opts := WatchOptions{}
		opts.fill()
		changes := watch(ctx, s, opts)
		f(changes)
		cancel()
		for range changes {
			t.Error("a change after the end")
		}
	})
}

func (s *scripted) tell() { s.news <- struct{}{} }

// none fails the test if there is a change to take once everything has settled.
func none(t *testing.T, changes <-chan Change) {
	t.Helper()
	time.Sleep(time.Second)
	synctest.Wait()
	select {
	case c := <-changes:
		t.Errorf("told of %+v", c)
	default:
	}
}

func TestWatchLetsChangesComeTogether(t *testing.T) {
	s := newScripted("192.0.2.1")
	watching(t, s, func(changes <-chan Change) {
		started := time.Now()
		for i := range 5 {
			s.set("192.0.2.1", netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)}).String())
			s.tell()
			time.Sleep(10 * time.Millisecond)
		}
		c := <-changes
		if took := time.Since(started); took != 250*time.Millisecond {
			t.Errorf("told after %v", took)
		}
		if !c.Addrs || c.Routes || !slices.Contains(c.Now.Addrs, netip.MustParseAddr("192.0.2.14")) {
			t.Errorf("told of %+v", c)
		}
		if n := s.looked(); n != 2 {
			t.Errorf("looked %d times", n)
		}
		none(t, changes)
	})
}

// A change that nobody takes is replaced by the next, and dropped when all is as before.
func TestWatchMergesWhatNobodyTakes(t *testing.T) {
	s := newScripted("192.0.2.1")
	watching(t, s, func(changes <-chan Change) {
		s.set("192.0.2.2")
		s.tell()
		time.Sleep(time.Second)
		s.set("192.0.2.3")
		s.tell()
		time.Sleep(time.Second)
		if c := <-changes; !slices.Equal(c.Now.Addrs, []netip.Addr{netip.MustParseAddr("192.0.2.3")}) {
			t.Errorf("told of %+v", c)
		}
		none(t, changes)
		s.set("192.0.2.4")
		s.tell()
		time.Sleep(time.Second)
		s.set("192.0.2.3")
		s.tell()
		none(t, changes)
	})
}

func TestWatchIgnoresNewsOfNothing(t *testing.T) {
	s := newScripted("192.0.2.1")
	watching(t, s, func(changes <-chan Change) {
		s.tell()
		none(t, changes)
	})
}

// News without end is looked at four times a second and not put off.
func TestWatchUnderEndlessNews(t *testing.T) {
	s := newScripted("192.0.2.1")
	watching(t, s, func(changes <-chan Change) {
		s.set("192.0.2.2")
		told := 0
		for range 1000 {
			s.tell()
			time.Sleep(time.Millisecond)
			select {
			case <-changes:
				told++
			default:
			}
		}
		if n := s.looked(); told != 1 || n < 4 || n > 6 {
			t.Errorf("told %d times, looked %d times in a second", told, n)
		}
	})
}

func TestWatchKeepsWhatItKnewThroughErrors(t *testing.T) {
	s := newScripted("192.0.2.1")
	watching(t, s, func(changes <-chan Change) {
		s.fail(errors.New("interrupted"))
		s.set("192.0.2.2")
		s.tell()
		none(t, changes)
		s.fail(nil)
		if c := <-changes; !c.Addrs {
			t.Errorf("told of %+v", c)
		}
	})
}

func TestWatchTellsOfWhatCouldNotBeReadAtFirst(t *testing.T) {
	s := newScripted("192.0.2.1")
	s.fail(errors.New("interrupted"))
	watching(t, s, func(changes <-chan Change) {
		time.Sleep(time.Second)
		s.fail(nil)
		if c := <-changes; !c.Addrs || len(c.Now.Addrs) != 1 {
			t.Errorf("told of %+v", c)
		}
	})
}

func TestPollerLooksAtItsInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := WatchOptions{Poll: 3 * time.Second}
		opts.fill()
		p := newPoller(opts)
		started := time.Now()
		if err := p.wait(); err != nil || time.Since(started) != 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(started))
		}
		p.close()
		p.close()
		if p.wait() == nil {
			t.Error("waits on after close")
		}
	})
}

// Both ways of reading agree on the addresses.
func TestReadNetworkHere(t *testing.T) {
	got, err := ReadNetwork(nil)
	if err != nil {
		t.Fatal(err)
	}
	opts := WatchOptions{}
	opts.fill()
	p := newPoller(opts)
	defer p.close()
	polled, err := p.read()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Addrs, polled.Addrs) {
		t.Errorf("%v, but polled %v", got.Addrs, polled.Addrs)
	}
	for _, r := range polled.Routes {
		if !r.Source.IsValid() || r.Source.Is6() != r.IPv6 {
			t.Errorf("route %+v", r)
		}
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	changes := Watch(ctx, WatchOptions{})
	cancel()
	for range changes { // a change of this machine's network is no concern of this test
	}
}

func TestNetworksCompare(t *testing.T) {
	a := Network{
		Addrs:  []netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.1")},
		Routes: []DefaultRoute{{Iface: "eth0", IPv6: true}, {Iface: "eth1", Metric: 100}, {Iface: "eth0", Metric: 50}},
	}.sorted()
	if len(a.Addrs) != 2 || !a.Addrs[0].Is4() {
		t.Errorf("addresses %v", a.Addrs)
	}
	if a.Routes[0].Metric != 50 || a.Routes[1].Metric != 100 || !a.Routes[2].IPv6 {
		t.Errorf("routes %v", a.Routes)
	}
}
