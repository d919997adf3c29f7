package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// writeTimeout is how long one frame may take to leave.
const writeTimeout = 10 * time.Second

// closing is why a stream ends, as the gateway is told in the close frame (RFC 6455, section 7.4).
type closing struct {
	code   websocket.StatusCode
	reason string // at most 123 bytes
	abrupt bool   // the peer is not expected to answer
}

// Error gives the reason.
func (c *closing) Error() string { return c.reason }

// Why this side ends a stream.
var (
	goingAway  = &closing{websocket.StatusGoingAway, "the coordinator is shutting down", false}
	replaced   = &closing{websocket.StatusPolicyViolation, "replaced by a newer connection of the same gateway", true}
	unenrolled = &closing{websocket.StatusPolicyViolation, "no longer enrolled", false}
	tooSlow    = &closing{websocket.StatusTryAgainLater, "the gateway does not keep up", true}
	expired    = &closing{websocket.StatusServiceRestart, "the credential has run out; prove again who you are", false}
	silent     = &closing{websocket.StatusPolicyViolation, "no answer to pings", true}
	changed    = &closing{websocket.StatusServiceRestart, "the network's relays or STUN servers have changed", false}
	resync     = &closing{websocket.StatusServiceRestart, "say again what you hold", false}
)

// stream is one gateway's WebSocket. Three goroutines share it, and those who work off what the gateway says of its own accord:
//
//	reader ── answers ──► the calls that wait for them
//	   └───── renewed, end, taken, candidates, leaving, flows ──► inbox ──► workers
//	calls ── offer, renew, renewed, end, candidates ──► queue ──► writer
//	keeper: pings, presence
//
// Whatever ends it first says why; the others follow, and run waits for them.
type stream struct {
	api     *API
	conn    *websocket.Conn
	own     *ledger // shared by the gateways of one enrolment
	network string
	addr    string
	log     *slog.Logger

	// Set by open, before any goroutine starts; the presence is the keeper's after that, by way of mu.
	who      session.Gateway
	onRecord bool      // that it was let in
	flows    uint64    // the last batch of flow records that is stored; the flows' worker's
	renew    time.Time // when the gateway is due a fresh ticket for relays; the keeper's
	hellos   int64     // bytes of own.hellos; open's

	queue  chan wire.Frame // to the writer
	inbox  *inbox          // to the workers
	kick   chan struct{}   // to the keeper: say again that we are live, something changed
	proofs *rate.Limiter   // of credentials
	load   atomic.Int64    // sessions that the gateway holds, roughly
	said   atomic.Int64    // load as it was announced last
	over   chan struct{}   // closed by end
	gone   chan struct{}   // closed when run is through

	workers sync.WaitGroup // who work the inbox off; the reader starts them

	mu       sync.Mutex
	enrolled enrolment // proven when the stream was opened, and again since
	presence state.Presence
	why      error
	nextID   uint64
	calls    map[uint64]chan json.RawMessage
}

func newStream(a *API, conn *websocket.Conn, network string, e enrolment, own *ledger, addr string) *stream {
	conn.SetReadLimit(wire.MaxState) // until the hello is there
	return &stream{
		api: a, conn: conn, own: own, network: network, enrolled: e, addr: addr, log: a.log,
		queue: make(chan wire.Frame, a.opts.Queue), inbox: newInbox(own), kick: make(chan struct{}, 1),
		proofs: rate.NewLimiter(rate.Every(10*time.Second), 4),
		over:   make(chan struct{}), gone: make(chan struct{}), calls: map[uint64]chan json.RawMessage{},
	}
}

// end ends the stream; the first reason stays.
func (s *stream) end(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why == nil {
		s.why = why
		close(s.over)
	}
}

// run is the stream's whole life.
func (s *stream) run(ctx context.Context) {
	defer close(s.gone)
	defer s.api.unregister(s)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.openUntilOver(ctx); err != nil {
		s.end(err)
		s.close()
		s.logEnd(s.why)
		return
	}
	stop, err := s.api.opts.Store.Serve(s.who.Instance, s.handle)
	if err != nil {
		s.end(&closing{websocket.StatusTryAgainLater, "the coordinator cannot reach its state", false})
		s.close()
		s.logEnd(err)
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.end(s.readAll(ctx)) })
	wg.Go(func() { s.end(s.writeAll(ctx)) })
	wg.Go(func() { s.end(s.keep(ctx)) })
	<-s.over
	s.close()
	cancel()
	wg.Wait()
	s.workers.Wait()
	s.inbox.close()
	stop()
	s.leave(ctx)
	s.logEnd(s.why)
}

// openUntilOver opens the stream, unless it is ended meanwhile.
func (s *stream) openUntilOver(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	opened := make(chan error, 1)
	go func() { opened <- s.open(ctx) }()
	select {
	case err := <-opened:
		cancel()
		return err
	case <-s.over:
		cancel()
		return <-opened
	}
}

// close tells the gateway why, unless it cannot hear.
func (s *stream) close() {
	var c *closing
	if !errors.As(s.why, &c) || c.abrupt {
		_ = s.conn.CloseNow()
		return
	}
	_ = s.conn.Close(c.code, c.reason)
}

// leave says that the gateway is gone, so that no join waits for it.
func (s *stream) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := s.api.opts.Store.DropPresence(ctx, s.who.Instance); err != nil {
		s.log.Warn("gateway's presence not removed; it will expire", "err", err)
	}
}

// readFrame reads one message.
func (s *stream) readFrame(ctx context.Context) (wire.Frame, error) {
	kind, data, err := s.conn.Read(ctx)
	if err != nil {
		return wire.Frame{}, fmt.Errorf("read from the gateway: %w", err)
	}
	return parseFrame(kind, data)
}

func parseFrame(kind websocket.MessageType, data []byte) (f wire.Frame, err error) {
	if kind == websocket.MessageText {
		f, err = wire.ParseFrame(data)
	}
	if kind != websocket.MessageText || err != nil {
		return f, &closing{websocket.StatusUnsupportedData, "a message is not a frame", false}
	}
	return f, nil
}

// readAll takes frames until the stream is over. Answers go straight to who waits for them.
func (s *stream) readAll(ctx context.Context) error {
	for {
		f, err := s.readFrame(ctx)
		if err != nil {
			return err
		}
		switch f.Type {
		case wire.FrameAnswer:
			s.settle(f.ID, f.Body)
		case wire.FrameRenewed, wire.FrameEnd, wire.FrameCandidates, wire.FrameCredential, wire.FrameLeaving, wire.FrameFlows, wire.FrameTaken:
			if !s.take(ctx, f) {
				return nil
			}
		default: // a newer gateway's; it knows our version and can do without
		}
	}
}

// writeAll sends what is queued.
func (s *stream) writeAll(ctx context.Context) error {
	var room []byte
	for {
		select {
		case f := <-s.queue:
			if cap(room) > maxRoom { // once there was a frame that is larger than most
				room = nil
			}
			room = f.Append(room[:0])
			if err := s.write(ctx, room); err != nil {
				return fmt.Errorf("write to the gateway: %w", err)
			}
		case <-s.over:
			return nil
		}
	}
}

// maxRoom bounds the bytes that a stream keeps for the frames that it writes.
const maxRoom = 16 << 10

func (s *stream) write(ctx context.Context, frame []byte) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return s.conn.Write(ctx, websocket.MessageText, frame)
}

// enqueue hands a frame to the writer without waiting. A gateway that lets its queue fill up loses its stream.
func (s *stream) enqueue(f wire.Frame) error {
	select {
	case <-s.over:
	case s.queue <- f:
		return nil
	default:
		s.end(tooSlow)
	}
	return problem.New(problem.GatewayTimeout, "the gateway's stream broke", "try again in a few seconds")
}

// handle takes a message for the gateway from any node: a frame, answered by the gateway or, where it gives no answer,
// by whether its stream took it.
func (s *stream) handle(ctx context.Context, msg []byte) []byte {
	f, err := wire.ParseFrame(msg)
	if err != nil {
		return refusal(problem.Wrap(err, problem.BadRequest, "a message between nodes does not parse", "run the same version on every node"))
	}
	if f.Type == wire.FrameOffer || f.Type == wire.FrameRenew {
		return s.call(ctx, f)
	}
	if err := s.enqueue(f); err != nil {
		return refusal(err)
	}
	return []byte("{}")
}

// call sends a frame and waits for the answer under its id.
func (s *stream) call(ctx context.Context, f wire.Frame) []byte {
	ctx, cancel := context.WithTimeout(ctx, s.api.opts.AnswerTimeout)
	defer cancel()
	reply := make(chan json.RawMessage, 1)
	s.mu.Lock()
	s.nextID++
	f.ID = s.nextID
	s.calls[f.ID] = reply
	s.mu.Unlock()
	defer s.settle(f.ID, nil)
	if err := s.enqueue(f); err != nil {
		return refusal(err)
	}
	select {
	case body := <-reply:
		if f.Type == wire.FrameOffer && !isStandby(f) {
			s.load.Add(1) // corrected by the keeper where it was refused
		}
		return body
	case <-ctx.Done():
		return refusal(problem.New(problem.GatewayTimeout, "the gateway did not answer in time", "try again; if it stays so, look at the gateway's log"))
	case <-s.over:
		return refusal(problem.New(problem.GatewayTimeout, "the gateway's stream broke", "try again in a few seconds"))
	}
}

// isStandby reports whether an offer is of a session that another gateway carries.
func isStandby(f wire.Frame) bool {
	if !bytes.Contains(f.Body, []byte(`"standby":true`)) { // nearly always, and it is large
		return false
	}
	var o struct {
		Standby bool `json:"standby"`
	}
	return json.Unmarshal(f.Body, &o) == nil && o.Standby
}

// settle gives an answer to the call that waits for it, if it still does.
func (s *stream) settle(id uint64, body json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reply := s.calls[id]; reply != nil && body != nil {
		reply <- body
	}
	delete(s.calls, id)
}

func refusal(err error) []byte {
	doc, _ := json.Marshal(problem.From(err)) // strings alone: it always encodes
	raw, _ := json.Marshal(wire.Answer{Problem: doc})
	return raw
}
