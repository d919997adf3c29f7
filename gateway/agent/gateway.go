// Package agent is a gateway: it dials out to its coordinator, admits sessions by verifying their tokens itself, and carries
// them into the private network for as long as their leases last.
//
//	coordinator ──offer──▶ stream ─▶ door ─▶ judge (token, pins, own policy)
//	                                  │
//	                                  ├─▶ table (addresses, deadlines by the monotonic clock)
//	                                  └─▶ plane (tunnel peer, forwarder, services inside the tunnel)
//
// Running sessions need only the gateway: they renew through the tunnel whether or not the stream is up.
package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/gateway/trace"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/portmap"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	policyEvery  = 5 * time.Second // how soon a changed policy file is noticed
	flushTimeout = 2 * time.Second // for the last words to the coordinator
)

// Gateway is a running gateway.
type Gateway struct {
	opts     Options
	log      *slog.Logger
	instance string
	key      wire.Key
	client   *http.Client
	verifier *claims.Verifier
	door     *door
	table    *table
	plane    *plane
	gather   *gatherer
	relays   *relays
	mapper   *portmap.Manager // nil where no router is asked
	stream   *stream
	out      *outbox
	metrics  *metrics
	traces   *trace.Log

	stopAll  context.CancelFunc
	wg       sync.WaitGroup
	slots    chan struct{} // requests of the coordinator under way
	offers   sync.WaitGroup
	closing  sync.Once
	closeErr error
	acked    atomic.Bool // the coordinator acknowledges what it records of flows
}

// Start checks opts, opens the sockets and begins to dial the coordinator. It does not wait for it. ctx bounds the start alone:
// the gateway runs until [Gateway.Close].
func Start(ctx context.Context, opts Options) (*Gateway, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	g := &Gateway{opts: opts, log: opts.Logger, instance: rand.Text(), out: newOutbox(), metrics: newMetrics(), slots: make(chan struct{}, opts.Limits.Offers)}
	if err := g.build(); err != nil {
		return nil, errors.Join(err, g.release())
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.stopAll = stop
	g.gather.update()
	g.wg.Go(func() { g.gather.run(run) })
	g.wg.Go(func() { g.watchNetwork(run) })
	if g.mapper != nil {
		g.wg.Go(func() { g.mapper.Run(run) })
	}
	g.wg.Go(func() { g.stream.run(run) })
	g.wg.Go(func() {
		if err := g.verifier.Prefetch(run); err != nil {
			g.log.Warn("an issuer's keys cannot be fetched yet", "err", err)
		}
	})
	if opts.PolicyFile != "" {
		g.wg.Go(func() { g.door.watchPolicy(run, opts.PolicyFile) })
	}
	warnOfFewFlows(g.log, opts.Limits.Forward.TotalFlows)
	g.log.Info("gateway started", "gateway", opts.Name, "network", opts.Network, "key", g.key.String(), "port", g.plane.tunnel.Port())
	return g, nil
}

// build makes the parts. What was made before an error is released by the caller.
func (g *Gateway) build() (err error) {
	o := &g.opts
	key, err := loadKey(o.StateDir, g.log)
	if err != nil {
		return err
	}
	g.key = key.Public()
	g.client = o.client()
	g.verifier, err = claims.New(claims.Options{Issuers: o.Issuers, InsecureHTTP: o.InsecureHTTP, HTTPClient: g.client, Logger: g.log})
	if err != nil {
		return err
	}
	j, err := newJudge(o, g.verifier)
	if err != nil {
		return err
	}
	own, err := newOwnAddrs(o.PublicAddress.Addr())
	if err != nil {
		return fmt.Errorf("list this machine's addresses: %w", err)
	}
	port, err := o.port()
	if err != nil {
		return err
	}
	g.traces, err = trace.New(trace.Options{Wake: g.out.poke})
	if err != nil {
		return err
	}
	g.out.flows = g.traces
	g.plane, err = newPlane(key, port, o, g.client, g.traces.Add)
	if err != nil {
		return err
	}
	g.gather, g.relays = newGatherer(g.plane.tunnel.Port(), o, g.log), newRelays(o, g.log)
	g.gather.relays, g.relays.lookup = g.relays, g.gather.lookup
	g.relays.set, g.relays.status = g.plane.tunnel.SetRelays, g.plane.tunnel.Relays
	g.relays.keep = g.plane.tunnel.SetStanding
	g.gather.reflexive, g.gather.refresh, g.gather.changed = g.plane.tunnel.Reflexive, own.refresh, g.out.setCandidates
	g.gather.found = g.plane.tunnel.SetNAT
	if g.mapper, err = g.newMapper(); err != nil {
		return err
	}
	g.table = newTable(o.Limits.Sessions, g.metrics.count, g.sessionEnded)
	g.door = &door{
		name: o.Name, key: g.key, judge: j, table: g.table, plane: g.plane, own: own, log: g.log,
		places: make(chan struct{}, o.Limits.Offers), rate: rate.NewLimiter(rate.Limit(o.Limits.OfferRate), 4*o.Limits.OfferRate),
		candidates: g.gather.current, grants: g.relays.grants, renewed: g.out.renew, taken: g.out.takeOver, metrics: g.metrics,
	}
	g.plane.handler = g.door.insideHandler()
	g.stream = &stream{
		url: o.Coordinator + wire.PathGateway, network: o.Network, client: g.client, credential: o.credential,
		hello: g.hello, welcome: g.welcome, handle: g.handle, join: g.offers.Wait, out: g.out, log: g.log,
		failed: g.metrics.streamFailed,
	}
	return g.metrics.serve(o.Metrics, g)
}

// Port is the tunnel's UDP port.
func (g *Gateway) Port() uint16 { return g.plane.tunnel.Port() }

// Carried is how many bytes have gone through the tunnel to and from the present sessions.
func (g *Gateway) Carried() uint64 { return g.plane.tunnel.Carried() }

// Key is the gateway's WireGuard public key.
func (g *Gateway) Key() wire.Key { return g.key }

// MetricsAddr is where the health and metrics page is served; empty where it is not.
func (g *Gateway) MetricsAddr() string { return g.metrics.addr() }

// Close says goodbye to the coordinator, ends all sessions, resets their flows, and waits for everything. It takes 5 s at most.
func (g *Gateway) Close() error {
	g.closing.Do(func() {
		g.log.Info("gateway stops", "gateway", g.opts.Name, "sessions", g.table.size())
		g.out.leave()
		g.table.close("gateway stops")
		ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		g.traces.Flush()
		g.out.flush(ctx)
		g.awaitTraces(ctx)
		g.stopAll()
		g.wg.Wait()
		g.closeErr = g.release()
	})
	return g.closeErr
}

// awaitTraces waits until the coordinator has recorded what became of the last flows, if it is one that says so.
func (g *Gateway) awaitTraces(ctx context.Context) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for g.acked.Load() && g.stream.up() && g.traces.Stats().Unproven > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// release closes what build made.
func (g *Gateway) release() error {
	err := g.metrics.close()
	if g.plane != nil {
		err = errors.Join(err, g.plane.close())
	}
	if g.traces != nil {
		g.traces.Close()
	}
	if g.verifier != nil {
		err = errors.Join(err, g.verifier.Close())
	}
	if g.client != nil {
		g.client.CloseIdleConnections()
	}
	return err
}

// hello is the gateway's whole state.
func (g *Gateway) hello() wire.Hello {
	candidates, mapping := g.gather.current()
	return wire.Hello{
		Version: wire.Version, Instance: g.instance, Name: g.opts.Name, Key: g.key, Candidates: candidates, Mapping: mapping,
		Sessions: g.table.held(), Program: g.opts.Program + " " + runtime.GOOS + "/" + runtime.GOARCH,
	}
}

// welcome takes what the coordinator says of the network. Overlay addresses that differ from those that sessions rely on are
// taken only once no session is held: no word of a coordinator moves a running session.
func (g *Gateway) welcome(w wire.Welcome) error {
	addrs, err := pair(w.Addresses)
	if err != nil || g.door.own.has(addrs[0]) || g.door.own.has(addrs[1]) {
		return problem.New(problem.Incompatible, "the coordinator gives the gateway no usable overlay addresses",
			"check the session ranges in the coordinator's file: they must not overlap the gateway's own networks")
	}
	if ranges := w.Overlay; len(ranges) <= maxRanges && !slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return !p.IsValid() }) {
		g.door.told.Store(&ranges)
	}
	for _, id := range w.End {
		g.table.cancel(id, "the coordinator says it is over")
	}
	ranges, err := serviceRanges(addrs, w.Services)
	if err != nil {
		return err
	}
	if held := g.table.size(); held > 0 && !g.plane.keeps(addrs, ranges) {
		g.log.Error("the coordinator moves the gateway's overlay or service addresses while sessions are held; the old ones stay",
			"network", g.opts.Network, "addr", addrs[0], "sessions", held, "next", "restart the gateway once its sessions are over")
	} else if err := g.plane.setNetwork(addrs, ranges); err != nil {
		return problem.Wrap(err, problem.Failed, "the overlay addresses cannot be set", "look at the gateway's log for the cause")
	}
	g.relays.list(w.Relays)
	if w.Standing != nil {
		g.relays.stand(*w.Standing)
	}
	g.gather.setServers(w.STUN)
	g.out.setCandidates(g.gather.current())
	return nil
}

// handle takes one frame. What verifies a token runs beside the stream, so that one slow issuer holds up nobody else.
func (g *Gateway) handle(ctx context.Context, f wire.Frame) {
	switch f.Type {
	case wire.FrameOffer:
		var o wire.Offer
		g.answer(ctx, f, &o, func(ctx context.Context) (wire.Answer, error) { return g.door.admit(ctx, o) })
	case wire.FrameRenew:
		var r wire.Renewed
		g.answer(ctx, f, &r, func(ctx context.Context) (wire.Answer, error) { return g.renew(ctx, r) })
	case wire.FrameRenewed:
		var r wire.Renewed
		if g.parse(f, &r) {
			g.renewStandby(ctx, r)
		}
	case wire.FrameCandidates:
		var t wire.Trickle
		if g.parse(f, &t) && len(t.Candidates) <= wire.MaxCandidates {
			g.trickle(t)
		}
	case wire.FrameFlowsAck:
		var a wire.FlowsAck
		if g.parse(f, &a) {
			g.acked.Store(true)
			g.traces.Acked(a.Seq)
		}
	case wire.FrameStanding:
		var s wire.Standing
		if g.parse(f, &s) {
			g.relays.stand(s)
		}
	case wire.FrameEnd:
		var e wire.End
		if g.parse(f, &e) {
			g.table.cancel(e.Session, "the coordinator ended it: "+bounded(e.Reason))
		}
	default:
		g.log.Debug("a frame of an unknown type", "type", bounded(string(f.Type)))
	}
}

// answer runs a request under its own deadline and queues what comes of it. Requests beyond the limit are refused unread.
func (g *Gateway) answer(ctx context.Context, f wire.Frame, body any, do func(context.Context) (wire.Answer, error)) {
	if err := json.Unmarshal(f.Body, body); err != nil {
		g.out.answer(f.ID, refusal(problem.New(problem.BadRequest, "the "+string(f.Type)+" does not parse",
			"update coordinator and gateway to the same version")))
		return
	}
	select {
	case g.slots <- struct{}{}:
	default:
		g.metrics.refused(errBusy)
		g.out.answer(f.ID, refusal(errBusy))
		return
	}
	g.offers.Go(func() {
		defer func() { <-g.slots }()
		ctx, cancel := context.WithTimeout(ctx, offerTimeout)
		defer cancel()
		a, err := do(ctx)
		if err != nil {
			a = refusal(err)
		}
		g.out.answer(f.ID, a)
	})
}

// renewStandby takes a token that has renewed a session at the gateway that carries it. A refusal is logged; the lease runs out.
func (g *Gateway) renewStandby(ctx context.Context, r wire.Renewed) {
	select {
	case g.slots <- struct{}{}:
	default:
		g.metrics.refused(errBusy)
		return
	}
	g.offers.Go(func() {
		defer func() { <-g.slots }()
		ctx, cancel := context.WithTimeout(ctx, offerTimeout)
		defer cancel()
		_, _ = g.renew(ctx, r)
	})
}

func (g *Gateway) renew(ctx context.Context, r wire.Renewed) (wire.Answer, error) {
	s, live := g.table.get(r.Session)
	if !live {
		return wire.Answer{}, problem.New(problem.SessionUnknown, "the gateway holds no such session", "join again")
	}
	lease, err := g.door.renew(ctx, s, r.Token)
	if err != nil {
		return wire.Answer{}, err
	}
	return wire.Answer{Lease: &lease}, nil
}

func (g *Gateway) trickle(t wire.Trickle) {
	if s, live := g.table.get(t.Session); live {
		s.carrier.AddCandidates(saneCandidates(t.Candidates))
		return
	}
	g.table.trickle(t.Session, t.Candidates)
}

func (g *Gateway) parse(f wire.Frame, v any) bool {
	err := json.Unmarshal(f.Body, v)
	if err != nil {
		g.log.Warn("the coordinator sent a frame that does not parse", "type", bounded(string(f.Type)), "code", problem.BadRequest)
	}
	return err == nil
}

// sessionEnded is told of each session that was live and is no more.
func (g *Gateway) sessionEnded(s *session, reason string) {
	counts := s.carrier.Counts()
	g.log.Info("session ended", "session", s.id, "repository", s.repo, "run_id", s.who.run, "reason", reason,
		"allowed", counts.Allowed, "denied", counts.Denied, "failed", counts.Failed, "up", counts.BytesUp, "down", counts.BytesDn)
	g.out.end(wire.End{Session: s.id, Reason: reason})
}

// bounded cuts text from outside to what a log line may hold.
func bounded(s string) string {
	if len(s) > 128 {
		return s[:128] + "…"
	}
	return s
}
