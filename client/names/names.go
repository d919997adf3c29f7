// Package names lets programs of a runner, and containers on it, use the names that a session is granted, and leaves all
// other names alone. How it does that depends on the system, from the least intrusive way on:
//
//   - systemd-resolved, where it runs, is told over D-Bus that the tunnel's interface answers for these names and no others.
//     What it keeps belongs to the interface.
//   - Else, and for containers always, an nftables table redirects DNS queries to a forwarder in this process, which sends the
//     granted names into the tunnel and the rest to the system's own servers. The kernel removes the table when the process
//     that owns it is gone.
//   - On macOS, scoped resolver files.
//
// Except for the files, nothing of it outlives the process, however that dies. No file of the system is changed.
package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/culvertnet/culvert/internal/wire"
)

// Options say which names go into the tunnel, and how it is called.
type Options struct {
	Interface string // of the tunnel, through which the servers of Names are reached
	Names     wire.Names
	// User is whose tunnel it is, by user id, where it is not everybody's: other ordinary users' queries are left alone.
	User int
	// Reserved are hosts that the runner itself lives on, such as the coordinator's: a gateway that claims them, or a domain that
	// holds them, is not believed. [Reserved] adds GitHub's and the clouds'.
	Reserved []string
	Logger   *slog.Logger // default: none
}

// Validate fills in defaults and refuses what cannot work.
func (o *Options) Validate() error {
	if o.Interface == "" {
		return errors.New("names need the tunnel's interface")
	}
	if len(o.Names.Servers) == 0 {
		return errors.New("names need a server in the tunnel")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Split is a split resolver that is in force.
type Split struct {
	mechanisms []mechanism
	refused    []string

	mu     sync.Mutex
	closed bool
}

// mechanism is one way of getting queries to where they belong.
type mechanism interface {
	name() string
	close() error
}

// errUnsupported says that a mechanism is not to be had on this machine.
var errUnsupported = errors.New("not on this machine")

// Start puts the names into force. Without any mechanism that works it fails: the names then resolve only where programs ask
// the gateway's server themselves.
func Start(ctx context.Context, opts Options) (*Split, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	scope, refused := newScope(opts.Names, opts.Reserved)
	s := &Split{refused: refused}
	if scope.empty() {
		return s, nil
	}
	var failed []error
	for _, start := range mechanisms {
		m, err := start(ctx, opts, scope, s.has)
		switch {
		case err == nil:
			s.mechanisms = append(s.mechanisms, m)
		case !errors.Is(err, errUnsupported):
			failed = append(failed, err)
		}
	}
	if len(s.mechanisms) == 0 {
		return nil, errors.Join(append(failed, fmt.Errorf("use granted names: %w", errUnsupported))...)
	}
	for _, err := range failed {
		opts.Logger.Warn("granted names do not resolve everywhere on this machine", "err", err)
	}
	return s, nil
}

func (s *Split) has(name string) bool {
	return slices.ContainsFunc(s.mechanisms, func(m mechanism) bool { return m.name() == name })
}

// Methods tells how names are resolved: "systemd-resolved", "nftables", "resolver files".
func (s *Split) Methods() []string {
	var all []string
	for _, m := range s.mechanisms {
		all = append(all, m.name())
	}
	return all
}

// Refused are names that the gateway claims and does not get, because the runner itself lives on them.
func (s *Split) Refused() []string { return s.refused }

// Close takes everything back. It is idempotent.
func (s *Split) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var all []error
	for _, m := range slices.Backward(s.mechanisms) {
		all = append(all, m.close())
	}
	return errors.Join(all...)
}

// scope decides which names are the tunnel's.
type scope struct {
	exact    map[string]bool
	suffixes []string // each with a leading dot
	servers  []netip.Addr
	services []netip.Prefix
}

// newScope takes what the gateway claims, less what is reserved and what is no host name.
func newScope(n wire.Names, reserved []string) (s *scope, refused []string) {
	s = &scope{exact: map[string]bool{}, servers: n.Servers, services: n.Services}
	protected := append(slices.Clone(Reserved), reserved...)
	for i := range protected {
		protected[i] = canonical(protected[i])
	}
	for _, name := range n.Exact[:min(len(n.Exact), wire.MaxNames)] {
		name = canonical(name)
		if !hostname(name) || within(name, protected) {
			refused = append(refused, name)
			continue
		}
		s.exact[name] = true
	}
	for _, suffix := range n.Suffixes[:min(len(n.Suffixes), wire.MaxNames)] {
		suffix = canonical(suffix)
		// A domain is also refused when something protected lies below it: *.com would take github.com along.
		holds := slices.ContainsFunc(protected, func(p string) bool { return strings.HasSuffix(p, "."+suffix) })
		if !hostname(suffix) || within(suffix, protected) || holds {
			refused = append(refused, "*."+suffix)
			continue
		}
		s.suffixes = append(s.suffixes, "."+suffix)
	}
	return s, refused
}

// within reports whether name is one of the domains or below one.
func within(name string, domains []string) bool {
	return slices.ContainsFunc(domains, func(d string) bool { return d != "" && (name == d || strings.HasSuffix(name, "."+d)) })
}

func (s *scope) empty() bool { return len(s.exact)+len(s.suffixes) == 0 }

// covers reports whether a name, in any case and with or without a final dot, is the tunnel's.
func (s *scope) covers(name string) bool {
	name = canonical(name)
	return s.exact[name] || slices.ContainsFunc(s.suffixes, func(suffix string) bool {
		return len(name) > len(suffix) && strings.HasSuffix(name, suffix)
	})
}

// domains are the names for a resolver that knows domains only: each stands for itself and all below it. What is below a granted
// name but not granted then comes to the gateway too, which refuses it.
func (s *scope) domains() []string {
	var all []string
	for name := range s.exact {
		all = append(all, name)
	}
	for _, suffix := range s.suffixes {
		all = append(all, strings.TrimPrefix(suffix, "."))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// believable reports whether an address is the gateway's to give.
func (s *scope) believable(a netip.Addr) bool {
	return slices.ContainsFunc(s.services, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
}

func canonical(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// hostname reports whether a name has the shape of a host's (RFC 1123, section 2.1, with underscores as in service names) and
// more than one label or is at least no top-level domain's business: a single label such as "db" is fine as an exact name.
func hostname(name string) bool {
	if name == "" || len(name) > 253 || name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}
