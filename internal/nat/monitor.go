package nat

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/time/rate"
)

// Network is what decides where this host's packets leave from. Two that are equal give the same candidates.
type Network struct {
	// Addrs are the addresses at which others may reach this host, as [HostCandidates] takes them, sorted.
	Addrs []netip.Addr
	// Routes are the default routes, sorted by family, then best first.
	Routes []DefaultRoute
}

// DefaultRoute is a way out.
type DefaultRoute struct {
	Iface  string
	Via    netip.Addr // the router; invalid on a point-to-point link, and where the system does not tell
	Source netip.Addr // the address that packets leave from; set only where the system does not tell the rest
	IPv6   bool
	Metric int // lower is better
}

// Change says that the network is not what it was.
type Change struct {
	Addrs  bool // an address came or went
	Routes bool // a default route did
	Now    Network
}

// WatchOptions configure [Watch]. The zero value is usual.
type WatchOptions struct {
	// Skip leaves interfaces out by name: their addresses, and routes through them; default [SkipVirtual]. The tunnel's own
	// interface belongs to it.
	Skip func(iface string) bool
	// Settle is how long changes are let come together before the network is looked at; default 250 ms.
	Settle time.Duration
	// Poll is how often it is looked at where the system does not tell of changes; default 10 s.
	Poll   time.Duration
	Logger *slog.Logger
}

func (o *WatchOptions) fill() {
	if o.Skip == nil {
		o.Skip = SkipVirtual
	}
	o.Settle = cmp.Or(o.Settle, 250*time.Millisecond)
	o.Poll = cmp.Or(o.Poll, 10*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// source tells what the network is, and when to look.
type source interface {
	read() (Network, error)
	// wait blocks until there may be news. It fails once close has been called.
	wait() error
	close()
}

// Watch tells of changes of this host's addresses and default routes. A change that nobody has taken yet is merged
// with the next one, and vanishes when it is undone. The channel is closed after ctx has ended, when nothing runs any more:
// who ranges over it has waited for everything.
func Watch(ctx context.Context, opts WatchOptions) <-chan Change {
	opts.fill()
	src, err := openSource(opts)
	if err != nil {
		opts.Logger.Warn("the system does not tell of changes of its network; looking now and then instead", "err", err, "every", opts.Poll)
		src = newPoller(opts)
	}
	return watch(ctx, src, opts)
}

// ReadNetwork gives the network as it is. skip leaves interfaces out by name, as in [WatchOptions].
func ReadNetwork(skip func(iface string) bool) (Network, error) {
	opts := WatchOptions{Skip: skip}
	opts.fill()
	src, err := openSource(opts)
	if err != nil {
		src = newPoller(opts)
	}
	defer src.close()
	return src.read()
}

func watch(ctx context.Context, src source, opts WatchOptions) <-chan Change {
	w := &watcher{
		src: src, log: opts.Logger, settle: opts.Settle, out: make(chan Change), wake: make(chan struct{}, 1),
		warned: rate.Sometimes{First: 1, Interval: time.Minute},
	}
	// After the source was opened and before anything can be waited for: what happens from here on is seen.
	first, err := src.read()
	if err == nil {
		w.told = first
	} else {
		w.wake <- struct{}{}
	}
	go w.run(ctx)
	return w.out
}

type watcher struct {
	src    source
	log    *slog.Logger
	settle time.Duration
	out    chan Change
	wake   chan struct{} // capacity 1: there may be news
	told   Network       // what the other side knows
	warned rate.Sometimes
}

// run is the whole life of a watcher.
func (w *watcher) run(ctx context.Context) {
	waiting := make(chan struct{})
	go func() {
		defer close(waiting)
		w.listen()
	}()
	defer close(w.out)
	defer func() { w.src.close(); <-waiting }()
	timer := time.NewTimer(w.settle)
	timer.Stop()
	// Counted from the first piece of news: endless news cannot put off looking.
	settling := false
	var pending Change
	var out chan<- Change // nil while there is nothing to tell
	for {
		wake := w.wake
		if settling {
			wake = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
			timer.Reset(w.settle)
			settling = true
		case <-timer.C:
			settling = false
			pending, out = w.look(pending, out)
		case out <- pending:
			w.told, out = pending.Now, nil
		}
	}
}

// look compares the network with what was told of it. Where it cannot be read, what was known stays.
func (w *watcher) look(pending Change, out chan<- Change) (Change, chan<- Change) {
	now, err := w.src.read()
	if err != nil {
		w.warned.Do(func() { w.log.Warn("the network cannot be read; trying again", "err", err) })
		w.ring()
		return pending, out
	}
	c := Change{Addrs: !slices.Equal(w.told.Addrs, now.Addrs), Routes: !slices.Equal(w.told.Routes, now.Routes), Now: now}
	if !c.Addrs && !c.Routes {
		return Change{}, nil
	}
	return c, w.out
}

// listen rings for every piece of news until the source is closed.
func (w *watcher) listen() {
	for w.src.wait() == nil {
		w.ring()
	}
}

func (w *watcher) ring() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// sorted puts what was read into the order in which it can be compared, each once.
func (n Network) sorted() Network {
	slices.SortFunc(n.Addrs, netip.Addr.Compare)
	n.Addrs = slices.Compact(n.Addrs)
	slices.SortFunc(n.Routes, func(a, b DefaultRoute) int {
		return cmp.Or(order(a.IPv6, b.IPv6), cmp.Compare(a.Metric, b.Metric), cmp.Compare(a.Iface, b.Iface),
			a.Via.Compare(b.Via), a.Source.Compare(b.Source))
	})
	n.Routes = slices.Compact(n.Routes)
	return n
}

// order puts false before true.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
