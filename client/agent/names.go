package agent

import (
	"context"
	"errors"
	"reflect"
	"sync"

	"github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/internal/wire"
)

// startNames makes a split resolver; see [names.Start].
type startNames func(context.Context, names.Options) (splitNames, error)

// splitNames is a split resolver in force; see [names.Split].
type splitNames interface {
	Methods() []string
	Refused() []string
	Close() error
}

func systemNames(ctx context.Context, opts names.Options) (splitNames, error) {
	split, err := names.Start(ctx, opts)
	if err != nil {
		return nil, err // not a nil *Split in an interface
	}
	return split, nil
}

// resolving is what the host resolves through the tunnel at present. It outlives sessions: while a new one is asked for, names
// stay where they are.
type resolving struct {
	mu    sync.Mutex
	split splitNames // nil: nothing
	names wire.Names
}

// useNames has this host resolve what the gateway grants by name. Where that does not work the tunnel is usable all the same,
// by address, so it is a warning.
func (a *Agent) useNames(ctx context.Context, gw wire.Gateway) {
	name := a.openedLink().Name()
	if name == "" {
		return // without an interface, the proxy resolves
	}
	a.resolving.mu.Lock()
	defer a.resolving.mu.Unlock()
	var want wire.Names
	if gw.Names != nil {
		want = *gw.Names
	}
	if reflect.DeepEqual(want, a.resolving.names) {
		return
	}
	a.dropNames()
	if len(want.Exact)+len(want.Suffixes) == 0 || len(want.Servers) == 0 {
		return
	}
	split, err := a.opts.startNames(ctx, names.Options{
		Interface: name, Names: want, User: a.opts.User, Reserved: append([]string{a.opts.url.Hostname()}, a.opts.Reserved...), Logger: a.log,
	})
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			a.log.Warn("granted names do not resolve on this host; `culvert exec` and addresses work", "err", err)
		}
		return
	}
	a.resolving.split, a.resolving.names = split, want
	if refused := split.Refused(); len(refused) > 0 {
		a.log.Warn("the gateway claims names that this runner needs itself, and does not get them", "names", refused)
	}
	a.log.Info("granted names resolve", "methods", split.Methods())
}

// dropNames takes the split resolver back; the caller holds the lock.
func (a *Agent) dropNames() {
	if a.resolving.split == nil {
		return
	}
	if err := a.resolving.split.Close(); err != nil {
		a.log.Warn("cannot take names back; they go with the interface", "err", err)
	}
	a.resolving.split, a.resolving.names = nil, wire.Names{}
}

func (a *Agent) closeNames() {
	a.resolving.mu.Lock()
	defer a.resolving.mu.Unlock()
	a.dropNames()
}
