package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// minIPv6 is the least MTU with which a link carries IPv6 (RFC 8200, section 5), in bytes.
const minIPv6 = 1280

// session is one key's life: asked for, admitted, in use, closed.
type session struct {
	wire.Session // what the coordinator said last; zero until it has
	agent        *Agent
	key          wire.PrivateKey
	ctx          context.Context // of what runs beside the session; ended by close
	cancel       context.CancelCauseFunc
	wait         sync.WaitGroup
	gather       *gatherer
	keeper       *keeper
	companion    *companion

	mu        sync.Mutex          // guards what follows
	way       *way                // the one in use, of which gateway and peer are copies
	gateway   wire.Gateway        // see [session.at]
	peer      *tunnel.Peer        // nil until admitted
	granted   map[string]bool     // names of relays that the session has tickets for
	relayKeys map[string]wire.Key // of relays, while there was a path
	token     wire.Secret         // the last one
	tokenAt   time.Time

	mtuMu  sync.Mutex
	mtu    int           // as last told; 0 before that
	pathUp chan struct{} // closed when the first path is there
	once   sync.Once
}

func newSession(a *Agent, key wire.PrivateKey) *session {
	s := &session{agent: a, key: key, pathUp: make(chan struct{}), keeper: newKeeper(), companion: newCompanion(), granted: map[string]bool{}, relayKeys: map[string]wire.Key{}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.gather = newGatherer(a, newHosts(s.ctx, &s.wait, a))
	return s
}

// begin asks for the session and returns when a gateway has taken it.
func (s *session) begin(ctx context.Context) error {
	// What begin starts ends with the session, and no later than ctx while begin runs.
	release := context.AfterFunc(ctx, func() { s.cancel(context.Cause(ctx)) })
	defer release()
	token, err := s.prepare()
	if err != nil {
		return err
	}
	a := s.agent
	select {
	case <-a.aside.known: // before there are routes that would lead there
	case <-s.ctx.Done():
		return asProblem(context.Cause(s.ctx))
	}
	found, _ := s.gather.take()
	request := wire.JoinRequest{
		Network:    a.opts.Network,
		Key:        s.key.Public(),
		Token:      token,
		Candidates: found.Candidates,
		Mapping:    found.Mapping,
		Relays:     nearest(a.tunnel),
		Client:     a.opts.Client,
	}
	err = a.api.join(s.ctx, request, s.event)
	if err == nil && s.peer == nil {
		err = problem.New(problem.Incompatible, "the coordinator gave no session", "check its version")
	}
	return err
}

// prepare gets everything that the request needs, all at once, and gives the token.
func (s *session) prepare() (wire.Secret, error) {
	a := s.agent
	token := make(chan wire.Secret, 1)
	connected := make(chan struct{})
	ready := make(chan struct{})
	s.start(func(ctx context.Context) error {
		t, err := s.freshToken(ctx)
		if err == nil {
			a.marks.set(&a.marks.token)
			token <- t
		}
		return err
	})
	s.start(func(ctx context.Context) error {
		t, err := a.ensureTunnel(s.key)
		if err == nil {
			close(ready)
			s.gather.run(ctx, t)
		}
		return err
	})
	s.start(func(ctx context.Context) error {
		return s.preconnect(ctx, connected)
	})
	var secret wire.Secret
	for token := token; secret == "" || connected != nil || ready != nil; {
		select {
		case secret = <-token:
		case <-connected:
			connected = nil
		case <-ready:
			ready = nil
		case <-s.ctx.Done():
			return "", asProblem(context.Cause(s.ctx))
		}
	}
	s.gather.await(s.ctx, grace)
	return secret, nil
}

// start runs something beside the session; its error ends the session.
func (s *session) start(do func(context.Context) error) {
	s.wait.Go(func() {
		if err := do(s.ctx); err != nil {
			s.cancel(err)
		}
	})
}

// preconnect opens the connection that the join will use. Only an answer that is certainly not Culvert's stops the join,
// which tells what is wrong better than we could here.
func (s *session) preconnect(ctx context.Context, connected chan struct{}) error {
	a := s.agent
	info, err := a.api.info(ctx, func(open bool) {
		if open {
			a.marks.set(&a.marks.connect)
		}
		close(connected)
	})
	if err != nil {
		a.log.Debug("the coordinator did not introduce itself", "err", err)
		if ctx.Err() == nil {
			a.notReached(err)
		}
		return nil
	}
	if info.Version != wire.Version {
		return problem.New(problem.Incompatible,
			fmt.Sprintf("the coordinator speaks version %d of the API, this program version %d", info.Version, wire.Version),
			"use the same release on both sides")
	}
	s.gather.extra <- info // once: there is room
	return nil
}

// event takes one line of the coordinator's answer.
func (s *session) event(e wire.JoinEvent) error {
	a := s.agent
	said, final := e.Admitted, false
	if e.Session != nil {
		said, final = e.Session, true
	}
	if err := checkSession(said, s.key.Public()); err != nil {
		return err
	}
	a.marks.set(&a.marks.join)
	s.Session = *said
	gw, err := s.choose()
	if err != nil {
		return err
	}
	if err := s.meet(gw, final); err != nil {
		return problem.Wrap(err, problem.Failed, "the session cannot be put in place: "+err.Error(), "look at the log for more")
	}
	return nil
}

// choose picks the gateway: the coordinator's first that the pins allow.
func (s *session) choose() (wire.Gateway, error) {
	pins := s.agent.opts.Pins
	i := slices.IndexFunc(s.Gateways, func(g wire.Gateway) bool {
		return len(pins) == 0 || slices.Contains(pins, g.Key)
	})
	if i < 0 {
		return wire.Gateway{}, problem.New(problem.GatewayKey,
			fmt.Sprintf("the gateway %q has another key than the pinned ones", s.Gateways[0].Name),
			"compare --gateway-key with what the gateway prints at its start; if they differ, somebody may pose as it")
	}
	return s.Gateways[i], nil
}

// meet puts a gateway behind the tunnel: with the first word its checks begin, with the last its routes come.
func (s *session) meet(gw wire.Gateway, final bool) error {
	a := s.agent
	known := s.turnTo(gw)
	if !known {
		// A session before may have left an MTU with which the kernel takes no IPv6 address, or more than fits now.
		if err := a.link.SetMTU(tunnel.StartMTU); err != nil {
			return fmt.Errorf("set the mtu: %w", err)
		}
		if err := s.addPeer(gw); err != nil {
			return err
		}
		if err := a.link.SetAddresses(s.Addresses); err != nil {
			return fmt.Errorf("set the addresses: %w", err)
		}
		id, secret := s.ID, s.Secret
		s.start(func(ctx context.Context) error {
			s.trickle(ctx, id, secret)
			return nil
		})
	}
	if err := a.setRoutes(gw); err != nil {
		return fmt.Errorf("set the routes: %w", err)
	}
	s.useRelays(s.Relays)
	if known {
		s.peer.AddCandidates(gw.Candidates)
		if err := s.peer.SetAllowedIPs(allowed(gw)); err != nil {
			return err
		}
	}
	if final {
		a.setNames(gw.Names)
		s.keeper.leased(s.Session, time.Now())
	}
	return nil
}

// turnTo makes a gateway the one that the session is about, and reports whether it was already. Another one, which would not have us, is
// left.
func (s *session) turnTo(gw wire.Gateway) (known bool) {
	s.mu.Lock()
	left := s.peer
	if s.peer != nil && s.gateway.Key == gw.Key {
		left = nil
	}
	if left != nil {
		s.way, s.peer = nil, nil
		clear(s.granted)
	}
	s.gateway = gw
	known = s.peer != nil
	if known {
		s.way.gateway = gw
	}
	s.mu.Unlock()
	if left != nil {
		s.agent.tunnel.RemovePeer(left)
	}
	return known
}

func allowed(gw wire.Gateway) []netip.Prefix {
	return append(hostPrefixes(gw.Addresses), routable(gw.Routes)...)
}

func (s *session) addPeer(gw wire.Gateway) error {
	w := &way{gateway: gw, id: s.ID, granted: s.granted}
	s.mu.Lock()
	s.way = w // before the first word of a path
	s.mu.Unlock()
	peer, err := s.agent.tunnel.AddPeer(s.events(w, tunnel.PeerOptions{
		Key:        gw.Key,
		Session:    s.ID,
		AllowedIPs: allowed(gw),
		Candidates: gw.Candidates,
		Initiate:   true,
	}))
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.peer, w.peer = peer, peer
	s.mu.Unlock()
	return nil
}

// onMTU keeps packets that are too long for the path in use from being sent at all.
func (s *session) onMTU(w *way, mtu int) {
	s.mu.Lock()
	active := w == s.way
	s.mu.Unlock()
	if !active {
		return
	}
	s.mtuMu.Lock()
	defer s.mtuMu.Unlock()
	a := s.agent
	err := a.link.SetMTU(mtu)
	if err == nil && s.mtu > 0 && s.mtu < minIPv6 && mtu >= minIPv6 { // the kernel has forgotten all of IPv6 meanwhile
		err = errors.Join(a.link.SetAddresses(s.Addresses), a.setRoutes(w.gateway))
	}
	s.mtu = mtu
	if err != nil {
		a.log.Warn("the tunnel's MTU cannot be set, so long packets may get lost", "mtu", mtu, "err", err)
	}
}

// trickle sends what is found after the request has gone out, for as long as the session lasts.
func (s *session) trickle(ctx context.Context, id string, secret wire.Secret) {
	a := s.agent
	var pause backoff
	for {
		select {
		case <-s.gather.news:
		case <-ctx.Done():
			return
		}
		late, some := s.gather.take()
		if !some {
			continue
		}
		_, err := a.api.update(ctx, id, secret, late)
		if err == nil {
			pause = backoff{}
			continue
		}
		if ctx.Err() == nil {
			a.log.Info("the coordinator did not take what was found late", "session", id, "err", err)
		}
		if problem.Temporary(err) && pause.wait(ctx) == nil {
			s.gather.untake()
		}
	}
}

// failed takes back what a session that came to nothing has done.
func (s *session) failed(err error) {
	s.cancel(err)
	s.agent.discard(s)
}

// close ends everything beside the session and its peer, and waits.
func (s *session) close() {
	s.cancel(context.Canceled)
	s.wait.Wait()
	for _, w := range []*way{s.companion.way, s.way} {
		if w != nil && w.peer != nil {
			s.agent.tunnel.RemovePeer(w.peer)
		}
	}
}

// asProblem keeps a problem as it is and explains a context's end.
func asProblem(err error) error {
	if errors.Is(err, errGaveUp) || errors.Is(err, context.DeadlineExceeded) {
		return problem.Wrap(err, problem.Timeout, "the time limit ran out", "try again, or give it more time with --timeout")
	}
	return err
}
