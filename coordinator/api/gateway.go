package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// gateway is GET /v1/gateway: it authenticates, then upgrades and stays for as long as the stream lives.
func (a *API) gateway(w http.ResponseWriter, r *http.Request) {
	if a.draining.Load() {
		a.fail(w, shuttingDown())
		return
	}
	network, enrolment, err := a.enrolled(r)
	if err != nil {
		a.log.Warn("gateway refused", "network", clip(printable(network), 64), "addr", middleware.GetClientIP(r.Context()),
			"code", problem.CodeOf(err), "err", err)
		a.opts.Audit.Refused(err, middleware.GetClientIPAddr(r.Context()))
		a.disbelieved(err, middleware.GetClientIPAddr(r.Context()))
		a.fail(w, err)
		return
	}
	if r.ProtoMajor != 1 || !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		a.fail(w, problem.New(problem.BadRequest, "this path takes a WebSocket over HTTP/1.1", "check that the proxy in between passes upgrades on"))
		return
	}
	if !a.begin() {
		a.fail(w, shuttingDown())
		return
	}
	defer a.running.Done()
	own, leave, err := a.ledgers.enter(network, enrolment.Enrolment)
	if err != nil {
		a.log.Warn("gateway refused", "network", network, "addr", middleware.GetClientIP(r.Context()), "code", problem.CodeOf(err), "err", err)
		a.fail(w, err)
		return
	}
	defer leave()
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		a.log.Warn("gateway's upgrade failed", "network", network, "err", err)
		return
	}
	s := newStream(a, conn, network, enrolment, own, middleware.GetClientIP(r.Context()))
	a.track(s)
	// The request's context is void once the connection is hijacked.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	s.run(ctx)
}

// begin counts a stream in, unless the API is closed.
func (a *API) begin() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.running.Add(1)
	return true
}

// track makes Close and reloads reach a stream from its first moment on.
func (a *API) track(s *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all[s] = struct{}{}
	if a.closed {
		s.end(goingAway)
	}
}

// register makes s the stream of its gateway instance. An earlier one of the same gateway is ended and waited for: it is
// dead, and the gateway knew before we did.
func (a *API) register(s *stream) error {
	for {
		a.mu.Lock()
		old := a.streams[s.who.Instance]
		switch {
		case a.closed:
			a.mu.Unlock()
			return goingAway
		case old == nil:
			a.streams[s.who.Instance] = s
			a.mu.Unlock()
			return nil
		case old.who.Network != s.who.Network || old.presence.Key != s.presence.Key:
			a.mu.Unlock()
			return &closing{websocket.StatusPolicyViolation, "another gateway has this instance id", false}
		}
		a.mu.Unlock()
		old.end(replaced)
		<-old.gone
	}
}

func (a *API) unregister(s *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, s)
	if a.streams[s.who.Instance] == s {
		delete(a.streams, s.who.Instance)
	}
}

// hello reads and checks how a gateway introduces itself.
func (s *stream) hello(ctx context.Context) (wire.Hello, error) {
	var h wire.Hello
	ctx, cancel := context.WithTimeout(ctx, s.api.opts.HelloTimeout)
	defer cancel()
	f, err := s.readHello(ctx)
	if err != nil {
		return h, err
	}
	refuse := func(why string) (wire.Hello, error) {
		p := problem.New(problem.Incompatible, why, "update coordinator and gateway to the same version")
		_ = s.write(ctx, wire.Frame{Type: wire.FrameAnswer, Body: refusal(p)}.Encode()) // in place of the welcome
		return h, &closing{websocket.StatusPolicyViolation, why, false}
	}
	if f.Type != wire.FrameHello || json.Unmarshal(f.Body, &h) != nil {
		return refuse("the first frame must be a hello")
	}
	if why := checkHello(&h); why != "" {
		return refuse(why)
	}
	s.conn.SetReadLimit(wire.MaxFrame)
	return h, nil
}

// open introduces both sides to each other: hello, reconciliation, welcome.
func (s *stream) open(ctx context.Context) error {
	defer s.forgetHello()
	h, err := s.hello(ctx)
	if err != nil {
		return err
	}
	s.who = session.Gateway{Network: s.network, Name: h.Name, Instance: h.Instance}
	s.log = s.log.With("gateway", h.Name, "network", s.network)
	s.presence = state.Presence{
		Instance: h.Instance, Name: h.Name, Network: s.network, Key: h.Key, Candidates: h.Candidates, Mapping: h.Mapping,
		Since: time.Now(),
	}
	if err := s.api.register(s); err != nil {
		return err
	}
	return s.welcome(ctx, h)
}

func (s *stream) welcome(ctx context.Context, h wire.Hello) error {
	over, err := s.api.opts.Sessions.Reconcile(ctx, s.who, h.Sessions)
	if err != nil {
		s.log.Error("cannot reconcile with the gateway", "err", err)
		return &closing{websocket.StatusTryAgainLater, "the coordinator cannot reach its state", false}
	}
	rules := s.api.rules.Load()
	cfg := rules.Config
	network, ok := cfg.Networks[s.network]
	if !ok || !s.enrolledIn(cfg) { // reloaded since the upgrade
		return unenrolled
	}
	if err := s.enrol(ctx, h); err != nil {
		return err
	}
	body := wire.Welcome{
		Version: wire.Version, Network: s.network, Addresses: network.Gateway(), Overlay: network.Overlay(),
		Services: network.Services,
		STUN:     rules.STUN, Relays: rules.Relays, Standing: s.standing(), End: over,
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode the welcome: %w", err)
	}
	if err := s.write(ctx, wire.Frame{Type: wire.FrameWelcome, Body: raw}.Encode()); err != nil {
		return fmt.Errorf("send the welcome: %w", err)
	}
	s.load.Store(int64(len(h.Sessions) - len(over)))
	s.compareKey(ctx)
	s.log.Info("gateway connected", "addr", s.addr, "program", h.Program, "sessions", len(h.Sessions), "over", len(over))
	return nil
}

// compareKey says loudly when a gateway has another WireGuard key than when it was last here. It is no reason to refuse it:
// one that keeps no state has a new key with every start. But runners that pin the old one will not talk to it, and a key that
// changes though the gateway keeps its state may be somebody else's.
func (s *stream) compareKey(ctx context.Context) {
	before, err := s.api.opts.Store.RememberGateway(ctx, s.network, s.who.Name, s.presence.Key)
	switch {
	case err != nil:
		s.log.Warn("the gateway's key cannot be compared with its last one", "err", err)
	case !before.IsZero() && before != s.presence.Key:
		s.recordKeyChange(ctx, before)
		s.log.Warn("the gateway's key has changed", "addr", s.addr, "was", before.String(), "key", s.presence.Key.String())
	}
}

// logEnd says why a stream is over. A gateway that said that it leaves, or that closed in good order, has not failed.
func (s *stream) logEnd(err error) {
	s.left(err)
	s.mu.Lock()
	leaving := s.presence.Leaving
	s.mu.Unlock()
	if websocket.CloseStatus(err) == websocket.StatusNormalClosure || leaving && errors.Is(err, io.EOF) {
		s.log.Info("gateway left", "addr", s.addr)
		return
	}
	level := slog.LevelInfo
	if c, ok := err.(*closing); ok && c.code == websocket.StatusPolicyViolation {
		level = slog.LevelWarn
	}
	s.log.Log(context.Background(), level, "gateway disconnected", "addr", s.addr, "err", err)
}
