package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	resolveTimeout = 5 * time.Second
	// relayWait is how long an offer waits for relays that have only just been named.
	relayWait = 2 * time.Second
	maxURL    = 1024 // of a relay, in bytes
	maxTicket = 1024
)

// relayName is what a relay may be called.
var relayName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// relays are the network's relays, as the coordinator lists them and their names resolve. The tunnel keeps them ready; an offer
// may name these and no others, so that offers cannot have us dial wherever a coordinator likes.
type relays struct {
	insecure bool // plain HTTP is taken beyond loopback
	lookup   func(ctx context.Context, server string) []netip.AddrPort
	set      func([]tunnel.Relay)
	keep     func(ticket wire.Secret, life time.Duration) error
	status   func() []tunnel.RelayStatus
	log      *slog.Logger

	mu     sync.Mutex
	listed []wire.Relay
	known  []tunnel.Relay
	ready  chan struct{} // closed once the names of listed have been looked up
}

// relaying keeps relays ready for sessions to come. What dials their WebSockets follows no redirect: only the relay that is
// listed was held against the rules for URLs.
func relaying(o *Options, client *http.Client) tunnel.RelayOptions {
	dial := *client
	dial.Timeout = 0
	dial.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return tunnel.RelayOptions{Keep: true, Dial: tunnel.DialRelay(&dial, http.Header{"User-Agent": {o.Program}})}
}

func newRelays(o *Options, log *slog.Logger) *relays {
	r := &relays{insecure: o.InsecureHTTP, log: log, ready: make(chan struct{})}
	close(r.ready)
	return r
}

// list takes the relays of a welcome. What cannot be one is left out.
func (r *relays) list(in []wire.Relay) {
	var sound []wire.Relay
	for _, one := range in[:min(len(in), wire.MaxRelays)] {
		twice := slices.ContainsFunc(sound, func(o wire.Relay) bool { return o.Name == one.Name })
		if !relayName.MatchString(one.Name) || twice || one.UDP == "" && one.URL == "" || !r.soundURL(one.URL) || len(one.UDP) > maxURL {
			r.log.Warn("the coordinator names a relay that is none", "relay", bounded(one.Name), "addr", bounded(one.UDP))
			continue
		}
		sound = append(sound, one)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Equal(sound, r.listed) {
		return
	}
	r.listed = sound
	if isClosed(r.ready) {
		r.ready = make(chan struct{})
	}
}

// soundURL wants https, or http where that is allowed; none at all is fine as well.
func (r *relays) soundURL(text string) bool {
	if text == "" {
		return true
	}
	u, err := url.Parse(text)
	if err != nil || len(text) > maxURL || u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return false
	}
	return u.Scheme == "https" || u.Scheme == "http" && (r.insecure || loopbackHost(u.Hostname()))
}

// stand takes the ticket with which WebSockets to relays are kept ready.
func (r *relays) stand(s wire.Standing) {
	life := time.Duration(s.Life)
	if life <= 0 || life > relay.StandingLife {
		r.log.Warn("the coordinator gives a ticket for relays that lasts for no time, or for too long", "life", life)
		return
	}
	if err := r.keep(s.Ticket, life); err != nil {
		r.log.Warn("the coordinator gives a ticket for relays that is none", "err", err)
	}
}

// refresh looks the names up of relays that are new or do not answer, and tells the tunnel what has changed.
func (r *relays) refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	r.mu.Lock()
	listed, before := r.listed, r.known
	r.mu.Unlock()
	reachable := map[string]bool{}
	for _, s := range r.status() {
		reachable[s.Name] = s.Reachable
	}
	now := make([]tunnel.Relay, len(listed))
	var wg sync.WaitGroup
	for i, one := range listed {
		now[i] = tunnel.Relay{Name: one.Name, URL: one.URL}
		was := slices.IndexFunc(before, func(o tunnel.Relay) bool { return o.Name == one.Name })
		if was >= 0 && reachable[one.Name] {
			now[i].UDP = before[was].UDP
		} else if one.UDP != "" {
			wg.Go(func() { now[i].UDP = r.lookup(ctx, one.UDP) })
		}
	}
	wg.Wait()
	if ctx.Err() != nil && len(before) > 0 {
		return // a lookup that was cut short says nothing
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.EqualFunc(now, before, sameRelay) {
		r.known = now
		r.set(now)
	}
	if slices.Equal(listed, r.listed) && !isClosed(r.ready) {
		close(r.ready)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func sameRelay(a, b tunnel.Relay) bool {
	return a.Name == b.Name && a.URL == b.URL && slices.Equal(a.UDP, b.UDP)
}

// grants turns an offer's tickets into what the tunnel takes, for the relays that are listed. They hold until ends by our own
// clock, whatever the coordinator's says: in the end the relay judges them.
func (r *relays) grants(ctx context.Context, in []wire.RelayGrant, ends time.Time) []tunnel.Grant {
	if len(in) == 0 {
		return nil
	}
	r.mu.Lock()
	ready := r.ready
	r.mu.Unlock()
	timer := time.NewTimer(relayWait)
	defer timer.Stop()
	select {
	case <-ready:
	case <-timer.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []tunnel.Grant
	for _, g := range in {
		i := slices.IndexFunc(r.known, func(k tunnel.Relay) bool { return k.Name == g.Name })
		if i < 0 || len(g.Ticket) > maxTicket {
			r.log.Warn("an offer names a relay that is not listed", "relay", bounded(g.Name))
			continue
		}
		out = append(out, tunnel.Grant{Relay: r.known[i], Ticket: g.Ticket, Expires: ends})
	}
	return out
}

// observations are where the relays see the tunnel's socket.
func (r *relays) observations() []nat.Observation {
	var out []nat.Observation
	for _, s := range r.status() {
		i := slices.IndexFunc(s.UDP, func(a netip.AddrPort) bool { return a.Addr().Is4() == s.Mapped.Addr().Is4() })
		if s.Reachable && s.Mapped.IsValid() && i >= 0 {
			out = append(out, nat.Observation{Server: s.UDP[i], Mapped: s.Mapped, RTT: s.RTT})
		}
	}
	return out
}
