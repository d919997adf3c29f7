package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/internal/wire"
)

// resolver is a host whose resolver can be split.
type resolver struct {
	mu     sync.Mutex
	begun  []names.Options
	closed int
	fails  error
}

func (r *resolver) start(_ context.Context, opts names.Options) (splitNames, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun = append(r.begun, opts)
	if r.fails != nil {
		return nil, r.fails
	}
	return &splitter{r}, nil
}

func (r *resolver) seen() ([]names.Options, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.begun), r.closed
}

type splitter struct{ r *resolver }

func (*splitter) Methods() []string { return []string{"test"} }
func (*splitter) Refused() []string { return nil }

func (s *splitter) Close() error {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	s.r.closed++
	return nil
}

// namedLink is a network stack that says it is an interface.
type namedLink struct{ link }

func (namedLink) Name() string { return "culvert9" }

func withInterface(opts *Options) {
	opts.openLink = func(_ Mode, log *slog.Logger) (link, error) {
		l, err := openLink(ModeProxy, 0, log)
		return namedLink{l}, err
	}
}

var grantedNames = &wire.Names{Servers: []netip.Addr{agenttest.Overlay}, Exact: []string{"db.internal"}}

func withNames(s *wire.Session) { s.Gateways[0].Names = grantedNames }

func TestGrantedNamesAreTheHostsWhileTheTunnelIsUp(t *testing.T) {
	w := agenttest.New(t)
	w.Session = withNames
	opts, host := options(t, w), &resolver{}
	opts.startNames, opts.Reserved = host.start, []string{"github.example.com"}
	withInterface(&opts)
	r := start(t, opts)
	r.up(t)
	begun, closed := host.seen()
	if len(begun) != 1 || closed != 0 {
		t.Fatalf("%d begun, %d closed", len(begun), closed)
	}
	if o := begun[0]; o.Interface != "culvert9" || !slices.Equal(o.Names.Exact, []string{"db.internal"}) || !slices.Contains(o.Reserved, "127.0.0.1") ||
		!slices.Contains(o.Reserved, "github.example.com") {
		t.Errorf("options %+v", o)
	}
	if err := r.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, closed := host.seen(); closed != 1 {
		t.Errorf("closed %d times", closed)
	}
}

func TestNamesThatDoNotResolveDoNotFailTheTunnel(t *testing.T) {
	w := agenttest.New(t)
	w.Session = withNames
	opts, host := options(t, w), &resolver{fails: errors.New("no resolver here")}
	opts.startNames = host.start
	withInterface(&opts)
	r := start(t, opts)
	r.up(t)
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service says %q", got)
	}
}

func TestWithoutAnInterfaceTheHostsResolverIsLeftAlone(t *testing.T) {
	w := agenttest.New(t)
	w.Session = withNames
	opts, host := options(t, w), &resolver{}
	opts.startNames = host.start
	start(t, opts).up(t)
	if begun, _ := host.seen(); len(begun) != 0 {
		t.Errorf("begun %d times", len(begun))
	}
}
