package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/culvertnet/culvert/client/uapi"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// grace is how long a join that could go out waits for the reflexive address, which saves a request later. It has had two
	// round trips by then, and where UDP is blocked it never comes.
	grace = 10 * time.Millisecond
	// pathLimit bounds the time from a session to the first bytes through its tunnel. After that another try, which may
	// meet another gateway, is worth more than waiting.
	pathLimit = 6 * time.Second
)

// errGaveUp is the cause of a context that Options.Timeout ended.
var errGaveUp = errors.New("the time limit ran out")

// establish takes a session and makes it usable, again and again until that works, is refused for good, or ctx ends. Every
// try has a key and a token of its own: the one before may have got half way.
func (a *Agent) establish(ctx context.Context, d demands) (*session, error) {
	var pause backoff
	var before error // what the last try failed with; the one that is cut short has less to say
	for {
		s, err := a.attempt(ctx, d)
		if err == nil {
			return s, nil
		}
		a.fail(err)
		if ctx.Err() != nil {
			return nil, a.gaveUp(ctx, cmp.Or(before, err))
		}
		if !problem.Temporary(err) {
			return nil, err
		}
		level := slog.LevelWarn
		if before != nil && before.Error() == err.Error() {
			level = slog.LevelDebug // said already, and a job's log is short of attention
		}
		a.log.Log(ctx, level, "cannot join yet", "code", problem.CodeOf(err), "err", err)
		before = err
		if pause.wait(ctx) != nil {
			return nil, a.gaveUp(ctx, err)
		}
	}
}

// gaveUp makes the error of a join that was ended from outside, around the last thing that went wrong.
func (a *Agent) gaveUp(ctx context.Context, last error) error {
	if !errors.Is(context.Cause(ctx), errGaveUp) {
		return problem.Wrap(last, problem.Cancelled, "cancelled before the tunnel was up", "")
	}
	p := problem.From(last)
	switch {
	case p.Code == problem.NoPath || p.Code == problem.NotUsable:
		return p
	case p.Code == problem.FlowUnreachable: // a target's name was looked up when the time was up
		return problem.Wrap(last, problem.Timeout, fmt.Sprintf("not up within %s: %s", a.opts.Timeout, p.Message), p.Next)
	case errors.Is(last, context.DeadlineExceeded) || errors.Is(last, errGaveUp):
		missing, next := a.missing()
		return problem.Wrap(last, problem.Timeout, fmt.Sprintf("not up within %s%s", a.opts.Timeout, missing), next)
	default:
		return problem.Wrap(last, problem.Timeout, fmt.Sprintf("not up within %s: %s", a.opts.Timeout, p.Message), p.Next)
	}
}

// missing says what a join has waited for in vain, and what to do about it.
func (a *Agent) missing() (what, next string) {
	m := &a.marks
	m.mu.Lock()
	defer m.mu.Unlock()
	const ask = "`culvert doctor` tells what this network lets through and what it does not"
	host, proxy, reason := a.opts.url.Host, a.api.proxy(), ""
	if m.connect.IsZero() && a.unreached != nil {
		reason = ": " + a.unreached.Error()
	}
	switch {
	case m.connect.IsZero() && m.token.IsZero():
		what, next = fmt.Sprintf(": neither %s nor GitHub's token service answers", host), ask
	case m.connect.IsZero():
		what, next = fmt.Sprintf(": no connection to the coordinator at %s", host), ask
	case m.token.IsZero():
		what, next = ": GitHub's token service does not answer", ask
		if s, ok := a.tokens.(proxiedTokens); ok {
			proxy = s.Proxy()
		}
	case m.join.IsZero():
		what, next = fmt.Sprintf(": the coordinator at %s does not answer", host), "try again, or look at the coordinator's log"
	default:
		return "", "try again, or give it more time with --timeout"
	}
	if proxy != nil {
		what, next = what+" through the proxy "+proxy.Host, "check HTTPS_PROXY, and that the proxy runs and lets this runner through; "+ask
	}
	return what + reason, next
}

// proxiedTokens is a source of tokens that may be behind a proxy.
type proxiedTokens interface {
	// Proxy is the one in between, nil for none.
	Proxy() *url.URL
}

// notReached remembers why the coordinator could not be connected to; nobody else does while the token is waited for.
func (a *Agent) notReached(err error) {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(inner) {
		err = inner
		if _, ok := inner.(*net.OpError); ok {
			break
		}
	}
	a.marks.mu.Lock()
	defer a.marks.mu.Unlock()
	a.unreached = err
}

// attempt is one try to get from nothing to bytes through the tunnel. Until the session is there, nothing waits for
// anything that it does not need:
//
//	key ─┬─ token ───────────────────┐
//	     ├─ connection to coordinator ┼─► join ─► addresses, checks ─► handshake ─► echo, wait-for, forwards
//	     └─ tunnel ─ STUN ─ ─ ─ ─ ─ ─ ┘ (or later, by PATCH)
func (a *Agent) attempt(ctx context.Context, d demands) (*session, error) {
	key, err := wire.NewPrivateKey()
	if err != nil {
		return nil, err
	}
	s := newSession(a, key)
	if err := s.begin(ctx); err != nil {
		s.failed(err)
		return nil, err
	}
	if err := s.use(ctx, d); err != nil {
		s.failed(err)
		return nil, err
	}
	a.mu.Lock()
	a.session, a.problem = s, nil
	a.mu.Unlock()
	s.start(s.accompany)
	return s, nil
}

// window is how many packets may wait in the tunnel's device in each direction: two batches keep both cores at work, and
// more gains nothing but memory (docs/performance.md).
const window = 128

// ensureTunnel opens link and tunnel, or gives the tunnel that is there the new key.
func (a *Agent) ensureTunnel(key wire.PrivateKey) (*tunnel.Tunnel, error) {
	a.mu.Lock()
	t := a.tunnel
	a.mu.Unlock()
	if t != nil {
		return t, t.SetKey(key)
	}
	l := a.openedLink()
	if l == nil {
		var err error
		if l, err = a.opts.openLink(a.opts.Mode, a.log); err != nil {
			return nil, fmt.Errorf("open the way into the tunnel: %w", err)
		}
		a.mu.Lock()
		a.link = l
		a.mu.Unlock()
	}
	relays := tunnel.RelayOptions{Dial: tunnel.DialRelay(a.api.http, http.Header{"User-Agent": {a.opts.Client}})}
	t, err := tunnel.New(tunnel.Options{Key: key, TUN: a.granted.Listen(l.Device()), Device: l.WireGuard(), Window: window, Relays: relays, Logger: a.log})
	if err != nil {
		return nil, problem.Wrap(err, problem.Failed, "the tunnel cannot be opened: "+err.Error(),
			"check that this process may open a UDP socket")
	}
	shown := a.showTools(l.Name(), t)
	a.mu.Lock()
	a.tunnel, a.shown = t, shown
	a.mu.Unlock()
	return t, nil
}

// showTools lets `wg show` see the tunnel, where there is an interface; nil where it cannot.
func (a *Agent) showTools(name string, t *tunnel.Tunnel) *uapi.Server {
	if name == "" || a.opts.tools == "" {
		return nil
	}
	server, err := uapi.Listen(uapi.Options{Dir: a.opts.tools, Name: name, State: func() uapi.State {
		return uapi.State{Port: t.Port(), Peers: t.Peers()}
	}})
	if err != nil {
		a.log.Info("wg does not show the tunnel", "err", err)
	}
	return server
}

func (a *Agent) openedLink() link {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.link
}

// discard ends a session: its peer at once, its lease in the background.
func (a *Agent) discard(s *session) {
	a.mu.Lock()
	if a.session == s {
		a.session = nil
	}
	a.mu.Unlock()
	s.close()
	if s.ID == "" {
		return
	}
	a.wait.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := a.api.end(ctx, s.ID, s.Secret); err != nil {
			a.log.Info("the coordinator did not take the end of the session; its lease will", "session", s.ID, "err", err)
		}
	})
}

// backoff spaces tries: 200 ms doubling to 10 s, each less up to half of it.
type backoff struct{ tries int }

func (b *backoff) next() time.Duration {
	full := min(200*time.Millisecond<<min(b.tries, 10), 10*time.Second)
	b.tries++
	return full - time.Duration(rand.Int64N(int64(full/2)))
}

// wait sleeps until the next try; an error says that ctx ended.
func (b *backoff) wait(ctx context.Context) error {
	timer := time.NewTimer(b.next())
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// checkSession refuses an answer that is not about us or that no coordinator in its right mind gives.
func checkSession(s *wire.Session, key wire.Key) error {
	bad := senseless
	switch {
	case s.ID != key.SessionID():
		return bad("the session is not the one that was asked for")
	case len(s.Addresses) == 0 || len(s.Addresses) > 8:
		return bad("it gives no address, or too many")
	case len(s.Relays) > wire.MaxRelays:
		return bad("it gives tickets for too many relays")
	case len(s.Gateways) == 0 || len(s.Gateways) > 64:
		return bad("it names no gateway, or too many")
	}
	for _, name := range append([]string{s.Network}, s.Rules...) {
		if !oneLine(name) {
			return bad("a name in it is not one")
		}
	}
	for _, addr := range s.Addresses {
		if !unicast(addr) {
			return bad("it gives an address that no host can have")
		}
	}
	for _, gw := range s.Gateways {
		if err := checkGateway(gw, key); err != nil {
			return err
		}
	}
	return nil
}

// senseless is the error for an answer that makes no sense.
func senseless(what string) error {
	return problem.New(problem.Incompatible, "the coordinator's answer makes no sense: "+what,
		"check that it is a Culvert coordinator of this program's version")
}

// checkGateway refuses what cannot be a gateway towards the holder of key.
func checkGateway(gw wire.Gateway, key wire.Key) error {
	const many = 4096
	if gw.Key.IsZero() || gw.Key == key || len(gw.Addresses) == 0 || len(gw.Addresses) > 8 ||
		len(gw.Candidates) > 2*wire.MaxCandidates || len(gw.Routes) > many || !oneLine(gw.Name) {
		return senseless("a gateway lacks its key, its name or its address, or has too much of something")
	}
	for _, addr := range gw.Addresses {
		if !unicast(addr) || contains(never, addr) {
			return senseless("a gateway has an address that no host can have")
		}
	}
	for _, r := range gw.Routes {
		if !r.IsValid() || r != r.Masked() || r.Addr().IsLoopback() || r.Addr().IsMulticast() {
			return senseless(fmt.Sprintf("a route to %v, which is loopback, multicast or no range", r))
		}
	}
	return nil
}

// oneLine reports whether a text may be shown in a job's log, where a line that begins with "::" is a workflow command.
func oneLine(s string) bool {
	return len(s) <= 1024 && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func unicast(addr netip.Addr) bool {
	return addr.IsValid() && addr.Zone() == "" && !addr.IsUnspecified() && !addr.IsLoopback() && !addr.IsMulticast() &&
		!addr.IsLinkLocalUnicast() && !addr.Is4In6()
}
