package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestDirectIsReadAsItIsMeant(t *testing.T) {
	s, err := newAside([]string{"192.0.2.7", "198.51.100.9/24", "2001:db8::/32", "Mirror.Example.com.", "mirror.example.com", "GitHub", "build"}, []string{"ghes.example.com"})
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	if !slices.Equal(s.prefixes, want) || !slices.Equal(s.names, []string{"build", "mirror.example.com"}) {
		t.Errorf("prefixes %v, names %v", s.prefixes, s.names)
	}
	for _, name := range []string{"ghes.example.com", "api.github.com", "results-receiver.actions.githubusercontent.com"} {
		if !slices.Contains(s.usual, name) {
			t.Errorf("github does not stand for %s", name)
		}
	}
	for _, name := range gitHubHosts {
		if !hostName.MatchString(name) {
			t.Errorf("%s is no host name", name)
		}
	}
	for _, entry := range []string{"", "*.github.com", "https://github.com", "github.com:443", "10.0.0.0/33", "10.0.0", "fe80::1%eth0", "a b", "-x.example", strings.Repeat("a", 64)} {
		_, err := newAside([]string{entry}, nil)
		if p := problem.From(err); err == nil || p.Code != problem.Usage || p.Next == "" {
			t.Errorf("--direct %q: %v", entry, err)
		}
	}
	if _, err := newAside(make([]string, maxDirect+1), nil); err == nil {
		t.Error("destinations without end are taken")
	}
}

// Whatever is granted, nothing that the job keeps for itself goes into the tunnel, and nothing else stays outside.
func TestDirectIsNeverInside(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefix := func(label string, bits int) netip.Prefix {
			b := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, label)
			a, _ := netip.AddrFromSlice(b)
			return netip.PrefixFrom(a, rapid.IntRange(bits, 32).Draw(t, label+" bits")).Masked()
		}
		granted, kept := prefix("granted", 0), prefix("kept", 4)
		s, err := newAside([]string{kept.String()}, nil)
		if err != nil {
			t.Fatal(err)
		}
		probe := rapid.SampledFrom([]netip.Addr{granted.Addr(), kept.Addr(), prefix("probe", 32).Addr()}).Draw(t, "address")
		if got, want := contains(s.without([]netip.Prefix{granted}), probe), granted.Contains(probe) && !kept.Contains(probe); got != want {
			t.Errorf("%s, granted %s, kept %s: inside %t", probe, granted, kept, got)
		}
	})
}

// zone is names whose addresses change.
type zone struct {
	mu    sync.Mutex
	addrs map[string][]netip.Addr
}

func (z *zone) set(name string, addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.addrs[name] = nil
	for _, a := range addrs {
		z.addrs[name] = append(z.addrs[name], netip.MustParseAddr(a))
	}
}

func (z *zone) lookup(_ context.Context, name string) ([]netip.Addr, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.addrs[name], nil
}

// Names are looked up before there are routes, and again: a service that moves stays outside, where it was and where it is.
func TestNamesThatStayOutsideAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{addrs: map[string][]netip.Addr{}}
		z.set("mirror.example.com", "192.0.2.1", "127.0.0.1")
		z.set("api.github.com", "192.0.2.2")
		var log strings.Builder
		told := &recorded{}
		a := &Agent{direct: newOutside(), link: told, log: slog.New(slog.NewTextHandler(&log, nil))}
		a.opts.lookup, a.opts.resolvers = z.lookup, func() []netip.Addr { return nil }
		var err error
		if a.aside, err = newAside([]string{"mirror.example.com", "gone.example.com", DirectGitHub}, nil); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var work sync.WaitGroup
		work.Go(func() { a.keepAside(ctx) })
		<-a.aside.known
		if err := a.setRoutes(wire.Gateway{Routes: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}); err != nil {
			t.Fatal(err)
		}
		outside := func(when string, want ...string) {
			t.Helper()
			for _, text := range want {
				addr := netip.MustParseAddr(text)
				if !slices.Contains(told.keep, addr) || a.inside(addr) {
					t.Errorf("%s %s goes into the tunnel; %v stay outside", when, addr, told.keep)
				}
			}
		}
		outside("at first", "192.0.2.1", "192.0.2.2")
		if !a.inside(netip.MustParseAddr("192.0.2.3")) {
			t.Error("what nobody has asked for stays outside")
		}
		z.set("mirror.example.com", "192.0.2.3")
		time.Sleep(asideAgain + time.Second)
		synctest.Wait()
		outside("later", "192.0.2.1", "192.0.2.2", "192.0.2.3")
		cancel()
		work.Wait()
		if text := log.String(); !strings.Contains(text, "gone.example.com") || strings.Contains(text, "names=[gone.example.com github]") {
			t.Errorf("the log says %s", text)
		}
	})
}

// A job that keeps what it was granted outside reaches it there, through the proxy as well.
func TestDirectGoesAroundTheTunnel(t *testing.T) {
	w := agenttest.New(t)
	opts := options(t, w)
	opts.Direct = []string{agenttest.Service.String()}
	r := start(t, opts)
	r.up(t)
	if r.inside(agenttest.Service) {
		t.Errorf("%s goes into the tunnel", agenttest.Service)
	}
	other := start(t, options(t, w))
	other.up(t)
	if !other.inside(agenttest.Service) {
		t.Errorf("without --direct %s does not go into the tunnel", agenttest.Service)
	}
}
