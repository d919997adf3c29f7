package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Times of the control stream.
const (
	dialTimeout     = 10 * time.Second
	welcomeTimeout  = 10 * time.Second
	writeTimeout    = 10 * time.Second
	pingEvery       = 15 * time.Second
	pingTimeout     = 10 * time.Second
	offerTimeout    = 8 * time.Second // to verify and admit; the coordinator has given up by then
	firstRetry      = 200 * time.Millisecond
	lastRetry       = 2 * time.Second // jobs wait for this one when the coordinator is back
	firstRefused    = 5 * time.Second // after a refusal that only a person can lift, who may be at it
	lastRefused     = time.Minute
	settled         = 3 * time.Second
	credentialEvery = 10 * time.Second // how often the credential's file is looked at
	goodbye         = time.Second      // for the coordinator to close in good order
)

// stream keeps one WebSocket to the coordinator, dialling it again whenever it ends.
type stream struct {
	url        string
	network    string
	client     *http.Client
	credential func() (wire.Secret, error)
	hello      func() wire.Hello                 // whole state, taken after out was opened
	welcome    func(wire.Welcome) error          // an error ends the stream
	handle     func(context.Context, wire.Frame) // offers and the like; called in order, must not block for long
	join       func()                            // waits for what handle started
	out        *outbox
	log        *slog.Logger
	refresh    time.Duration // how often the credential is looked at; [credentialEvery] is usual

	state    atomic.Int32 // 1 while welcomed
	connects atomic.Uint64
	trouble  atomic.Pointer[problem.Error] // why there is no stream: the last try's error; nil while welcomed, and before the first
	failed   func(problem.Code)            // counts a try; may be nil
}

// up reports whether the coordinator has welcomed the gateway.
func (s *stream) up() bool { return s.state.Load() == 1 }

// run keeps the stream until ctx ends.
func (s *stream) run(ctx context.Context) {
	wait, refused := backoff{first: firstRetry, last: lastRetry}, backoff{first: firstRefused, last: lastRefused}
	for ctx.Err() == nil {
		began := time.Now()
		welcomed, err := s.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if welcomed {
			refused.reset()
			if time.Since(began) > settled {
				wait.reset()
			}
		}
		next := &wait
		if permanent(err) {
			next = &refused
		}
		delay := next.next()
		s.tell(err, delay)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
	}
}

// tell says why there is no stream: in the log, in metrics, and to whoever asks how the gateway is.
func (s *stream) tell(err error, retry time.Duration) {
	p := problem.From(err)
	s.trouble.Store(p)
	if s.failed != nil {
		s.failed(p.Code)
	}
	what, level := "no stream to the coordinator", slog.LevelWarn
	if permanent(err) {
		what, level = "the coordinator is not to be had until somebody mends this", slog.LevelError
	}
	said := []any{"network", s.network, "addr", s.url, "code", p.Code, "err", p.Message, "next", p.Next, "retry", retry}
	if cause := errors.Unwrap(p); cause != nil {
		said = append(said, "cause", cause)
	}
	s.log.Log(context.Background(), level, what, said...)
}

// ready is nil while the coordinator has welcomed the gateway, else why it has not.
func (s *stream) ready() error {
	if s.up() {
		return nil
	}
	p := s.trouble.Load()
	switch {
	case p == nil:
		return problem.New(problem.Unreachable, "no stream to the coordinator yet", "look at the gateway's log")
	case permanent(p):
		return problem.New(p.Code, "no stream to the coordinator: "+p.Message, p.Next)
	}
	return problem.New(problem.Unreachable, "no stream to the coordinator: "+p.Message, p.Next)
}

// permanent reports whether only a person can lift a refusal. Anything else may come from something on the way.
func permanent(err error) bool {
	switch problem.CodeOf(err) {
	case problem.Unauthorized, problem.Incompatible, problem.NoNetwork, problem.Denied, problem.BadConfig,
		problem.TokenInvalid, problem.TokenIssuer, problem.TokenAudience, problem.UnknownName, problem.Certificate, problem.NoTLS:
		return true
	}
	return false
}

// once dials one stream and serves it to its end.
func (s *stream) once(ctx context.Context) (welcomed bool, err error) {
	credential, err := s.credential()
	if err != nil { // only a person mends that
		return false, err
	}
	conn, err := s.dial(ctx, credential)
	if err != nil {
		return false, err
	}
	defer conn.CloseNow()
	conn.SetReadLimit(wire.MaxState) // until the welcome is there
	s.out.open()
	defer s.out.shut()
	if err := s.greet(ctx, conn); err != nil {
		return false, err
	}
	s.connects.Add(1)
	s.trouble.Store(nil)
	s.state.Store(1)
	defer s.state.Store(0)
	s.log.Info("stream to the coordinator is up", "network", s.network, "addr", s.url)
	return true, s.serve(ctx, conn, credential)
}

func (s *stream) dial(ctx context.Context, credential wire.Secret) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	client := *s.client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	conn, resp, err := websocket.Dial(ctx, s.url, &websocket.DialOptions{HTTPClient: &client, HTTPHeader: http.Header{
		"Authorization":    {credential.Reveal()},
		wire.HeaderNetwork: {s.network},
	}})
	if err == nil {
		return conn, nil
	}
	if resp != nil && resp.StatusCode >= 400 && resp.Body != nil {
		return nil, problem.Read(resp)
	}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return nil, p // a proxy's word
	}
	if t, ok := s.client.Transport.(*egress.Transport); ok {
		if p := t.Fault(strings.TrimSuffix(s.url, wire.PathGateway), err); p != nil {
			return nil, p
		}
	}
	return nil, problem.Wrap(err, problem.Unreachable, "the coordinator cannot be reached",
		"check its URL, that it runs, and that the way out is open (HTTPS_PROXY is honoured)")
}

// greet sends hello and takes the welcome.
func (s *stream) greet(ctx context.Context, conn *websocket.Conn) error {
	if err := write(ctx, conn, frame(wire.FrameHello, 0, s.hello())); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, welcomeTimeout)
	defer cancel()
	f, err := read(ctx, conn)
	if err != nil {
		return err
	}
	if f.Type == wire.FrameAnswer { // a refusal in place of the welcome
		var a wire.Answer
		var p problem.Error
		if json.Unmarshal(f.Body, &a) == nil && json.Unmarshal(a.Problem, &p) == nil {
			return &p
		}
	}
	var w wire.Welcome
	if f.Type != wire.FrameWelcome || json.Unmarshal(f.Body, &w) != nil {
		return problem.New(problem.Incompatible, "the coordinator does not begin with a welcome",
			"update coordinator and gateway to the same version")
	}
	if w.Version != wire.Version {
		return problem.New(problem.Incompatible, fmt.Sprintf("the coordinator speaks version %d of the API, this gateway %d", w.Version, wire.Version),
			"update coordinator and gateway to the same version")
	}
	conn.SetReadLimit(wire.MaxFrame)
	return s.welcome(w)
}

// serve reads, writes and pings until one of them fails; it returns when all have ended. When ctx ends, the coordinator is told.
func (s *stream) serve(ctx context.Context, conn *websocket.Conn, credential wire.Secret) error {
	leaving := ctx
	// A read or write whose context ends cuts the connection, so that no word could be said any more.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer s.join()
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		select {
		case <-leaving.Done():
			stop := time.AfterFunc(goodbye, func() { cancel(context.Cause(leaving)) }) // cuts the read below, and that Close
			_ = conn.Close(websocket.StatusNormalClosure, "the gateway stops")
			stop.Stop()
			cancel(context.Cause(leaving))
		case <-ctx.Done():
		}
	})
	wg.Go(func() { cancel(s.writeAll(ctx, conn)) })
	wg.Go(func() { cancel(ping(ctx, conn)) })
	wg.Go(func() { s.proveAgain(ctx, conn, credential) })
	for {
		f, err := read(ctx, conn)
		if err != nil {
			cancel(err)
			return context.Cause(ctx)
		}
		s.handle(ctx, f)
	}
}

func (s *stream) writeAll(ctx context.Context, conn *websocket.Conn) error {
	for {
		f, err := s.out.next(ctx)
		if err != nil {
			return err
		}
		if err := write(ctx, conn, f); err != nil {
			s.out.unsent(f)
			return err
		}
	}
}

// proveAgain sends the credential whenever its file has changed: workload identity tokens rotate, and the coordinator ends a
// stream whose credential has run out. A file that cannot be read at the moment is looked at again.
func (s *stream) proveAgain(ctx context.Context, conn *websocket.Conn, sent wire.Secret) {
	tick := time.NewTicker(cmp.Or(s.refresh, credentialEvery))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now, err := s.credential()
		if err != nil {
			s.log.Warn("the credential for the coordinator cannot be read", "err", err)
			continue
		}
		if now == sent {
			continue
		}
		if write(ctx, conn, frame(wire.FrameCredential, 0, wire.Credential{Authorization: now})) != nil {
			return // the reader notices as well
		}
		sent = now
		s.log.Info("the credential has changed; the coordinator has the new one")
	}
}

func ping(ctx context.Context, conn *websocket.Conn) error {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		pctx, cancel := context.WithTimeout(ctx, pingTimeout)
		err := conn.Ping(pctx)
		cancel()
		if err != nil {
			return lost(err)
		}
	}
}

func write(ctx context.Context, conn *websocket.Conn, f wire.Frame) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	b, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode a %s frame: %w", f.Type, err)
	}
	if err := conn.Write(ctx, websocket.MessageText, b); err != nil {
		return lost(err)
	}
	return nil
}

func read(ctx context.Context, conn *websocket.Conn) (wire.Frame, error) {
	_, b, err := conn.Read(ctx)
	if err != nil {
		return wire.Frame{}, lost(err)
	}
	f, err := wire.ParseFrame(b)
	if err != nil {
		return f, problem.New(problem.Incompatible, "the coordinator sent something that is no frame",
			"check that nothing on the way changes the stream, and that both sides are of the same version")
	}
	return f, nil
}

func lost(err error) error {
	return problem.Wrap(err, problem.Unreachable, "the stream to the coordinator broke", "it is dialled again")
}

// backoff grows from first to last, with jitter. The first wait is at most first.
type backoff struct {
	first, last, now time.Duration
}

func (b *backoff) next() time.Duration {
	if b.now == 0 {
		b.now = b.first
	}
	d := jitter(b.now)
	b.now = min(b.now*2, b.last)
	return d
}

func (b *backoff) reset() { b.now = 0 }

// jitter gives between half of d and all of it.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }
