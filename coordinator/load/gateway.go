package load

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Times of a gateway's stream.
const (
	dialTimeout = 10 * time.Second
	redial      = 100 * time.Millisecond
	// redialUnknown is for a coordinator that does not know the issuer's keys yet, and counts what it does not believe.
	redialUnknown = time.Second
	leaseFor      = 10 * time.Minute
)

// gateway plays a gateway: it verifies every token that it is offered, as a real one does, and builds no tunnel.
type gateway struct {
	p         *player
	hello     wire.Hello
	client    *http.Client
	at        int // of the coordinators, for the first dial
	verified  atomic.Uint64
	refused   atomic.Uint64
	up        chan struct{} // closed once the first stream stands
	upOnce    sync.Once
	stuck     chan struct{} // closed once it is refused for good
	stuckOnce sync.Once

	mu      sync.Mutex
	conn    *websocket.Conn // nil while there is none
	welcome wire.Welcome
	held    held
	unsaid  map[string]wire.Renewed // renewals that no stream has taken
	why     error                   // the last stream's end
}

// openGateways starts all gateways and waits for their streams. One goes first: what keeps it away keeps them all away, and so many
// tries at once would make the coordinator take no more of them.
func (p *player) openGateways(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	stop = func() {
		cancel()
		wg.Wait()
	}
	transport := &http.Transport{TLSClientConfig: p.opts.TLS.Clone(), TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}
	for n := range p.opts.Gateways {
		g := newGateway(p, n, transport)
		p.gateways = append(p.gateways, g)
	}
	first, rest := p.gateways[:1], p.gateways[1:]
	for _, some := range [][]*gateway{first, rest} {
		for _, g := range some {
			wg.Go(func() { g.run(ctx) })
		}
		if err := standing(ctx, some); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}

// standing waits for the streams of some gateways: for long enough that a coordinator which knows the keys of an earlier run fetches
// those of this one.
func standing(ctx context.Context, some []*gateway) error {
	late := time.After(warmUpFor)
	for _, g := range some {
		select {
		case <-g.up:
			continue
		case <-g.stuck:
		case <-late:
		case <-ctx.Done():
			return interrupted("the stream of gateway "+g.hello.Name, g.lastError())
		}
		return fmt.Errorf("gateway %s gets no stream: %w", g.hello.Name, g.lastError())
	}
	return nil
}

// hopeless reports whether a gateway that is refused so will be refused again.
func hopeless(err error) bool {
	switch problem.CodeOf(err) {
	case problem.Unauthorized, problem.NoNetwork, problem.Denied, problem.BadRequest, problem.Incompatible,
		problem.TokenInvalid, problem.TokenIssuer, problem.TokenAudience:
		return true
	}
	return false
}

func newGateway(p *player, n int, transport *http.Transport) *gateway {
	h := wire.Hello{
		Version: wire.Version, Instance: rand.Text(), Name: fmt.Sprintf("load-%03d", n+1), Program: "load",
		// An address of the documentation's (RFC 5737); nobody sends anything there.
		Candidates: []wire.Candidate{{Kind: wire.Public, Addr: netip.MustParseAddrPort("192.0.2.1:51820")}},
	}
	rand.Read(h.Key[:])
	return &gateway{p: p, hello: h, client: &http.Client{Transport: transport}, at: n, up: make(chan struct{}), stuck: make(chan struct{}), held: newHeld(), unsaid: map[string]wire.Renewed{}}
}

func (g *gateway) lastError() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.why == nil {
		return errors.New("no answer")
	}
	return g.why
}

// run keeps a stream until ctx ends, to one coordinator after the other.
func (g *gateway) run(ctx context.Context) {
	said := ""
	for n := g.at; ctx.Err() == nil; n++ {
		err := g.once(ctx, g.p.opts.Coordinators[n%len(g.p.opts.Coordinators)])
		g.mu.Lock()
		stood, first := g.conn != nil, g.why == nil
		limited := problem.CodeOf(err) == problem.RateLimited
		if g.conn = nil; first || ctx.Err() == nil && !limited { // else what came before tells more
			g.why = err
		}
		g.mu.Unlock()
		pause := redial
		if limited || problem.CodeOf(err) == problem.TokenUnknownKey {
			pause = redialUnknown
		}
		switch {
		case ctx.Err() != nil:
		case stood:
			g.p.log.Warn("a gateway's stream ended", "gateway", g.hello.Name, "err", err)
			said = ""
		case first, said != string(problem.CodeOf(err)):
			said = string(problem.CodeOf(err))
			g.p.log.Warn("a gateway gets no stream, and tries again", "gateway", g.hello.Name, "err", err)
		}
		if hopeless(err) {
			g.stuckOnce.Do(func() { close(g.stuck) })
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// once dials a stream and serves it to its end.
func (g *gateway) once(ctx context.Context, base string) error {
	conn, err := g.dial(ctx, base)
	if err != nil {
		return err
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(wire.MaxState)
	if err := g.greet(ctx, conn); err != nil {
		return err
	}
	g.upOnce.Do(func() { close(g.up) })
	g.sayAgain(ctx, conn)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		_, data, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		if bytes.HasPrefix(data, offerHead) { // nearly all of them, and to take them apart twice would cost as much as their signature
			wg.Go(func() { g.answer(ctx, conn, data) })
			continue
		}
		f, err := wire.ParseFrame(data)
		if err != nil {
			return fmt.Errorf("a frame does not parse: %w", err)
		}
		wg.Go(func() { g.handle(ctx, conn, f) })
	}
}

func (g *gateway) dial(ctx context.Context, base string) (*websocket.Conn, error) {
	credential := wire.SchemeEnrol + " " + g.p.opts.EnrolSecret.Reveal()
	if g.p.opts.EnrolSecret == "" {
		token, err := g.p.issuer.identity()
		if err != nil {
			return nil, err
		}
		credential = wire.SchemeBearer + " " + token.Reveal()
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, strings.TrimRight(base, "/")+wire.PathGateway, &websocket.DialOptions{
		HTTPClient: g.client, HTTPHeader: http.Header{"Authorization": {credential}, wire.HeaderNetwork: {g.p.opts.Network}},
	})
	if err != nil && resp != nil && resp.StatusCode >= 400 && resp.Body != nil {
		return nil, problem.Read(resp)
	}
	return conn, err
}

// greet says what the gateway holds and hears what it no longer does.
func (g *gateway) greet(ctx context.Context, conn *websocket.Conn) error {
	h := g.hello
	g.mu.Lock()
	h.Sessions = g.held.all()
	g.mu.Unlock()
	if err := send(ctx, conn, wire.FrameHello, 0, h); err != nil {
		return err
	}
	_, data, err := conn.Read(ctx)
	if err != nil {
		return err
	}
	var f wire.Frame
	var w wire.Welcome
	if json.Unmarshal(data, &f) != nil || f.Type != wire.FrameWelcome || json.Unmarshal(f.Body, &w) != nil {
		return errors.New("the coordinator does not begin with a welcome")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conn, g.welcome = conn, w
	for _, id := range w.End {
		g.held.drop(id)
		g.p.live.lose(id, g.hello.Key)
	}
	return nil
}

// offerHead is how the frame of an offer begins, see [wire.Frame.Encode].
var offerHead = []byte(`{"type":"` + wire.FrameOffer + `"`)

// answer answers an offer.
func (g *gateway) answer(ctx context.Context, conn *websocket.Conn, data []byte) {
	var f struct {
		ID   uint64 `json:"id"`
		Body offer  `json:"body"`
	}
	rest, token := withoutToken(data)
	if json.Unmarshal(rest, &f) == nil {
		if token != "" {
			f.Body.Token = token
		}
		_ = send(ctx, conn, wire.FrameAnswer, f.ID, g.admit(ctx, f.Body)) // the stream's reader sees that it broke
	}
}

// withoutToken takes the token out of an offer, which is most of it: encoding/json looks at each byte three times. Where it does not stand there as a
// coordinator writes it, all is left as it is.
func withoutToken(data []byte) (rest []byte, token wire.Secret) {
	head, tail, ok := bytes.Cut(data, []byte(`"token":"`))
	end := bytes.IndexByte(tail, '"')
	if !ok || end < 0 || bytes.IndexByte(tail[:end], '\\') >= 0 || bytes.Contains(tail[end:], []byte(`"token"`)) {
		return data, ""
	}
	rest = make([]byte, 0, len(data))
	rest = append(append(append(rest, head...), `"token":"`...), tail[end:]...)
	return rest, wire.Secret(tail[:end])
}

// offer is what is looked at of a [wire.Offer].
type offer struct {
	Session    string        `json:"session"`
	Key        wire.Key      `json:"key"`
	Token      wire.Secret   `json:"token"`
	Addresses  []netip.Addr  `json:"addresses"`
	Lease      wire.Duration `json:"lease"`
	MaxSession wire.Duration `json:"max_session"`
	Grants     []struct {
		Rule string `json:"rule"`
	} `json:"grants"`
}

// handle answers any other frame.
func (g *gateway) handle(ctx context.Context, conn *websocket.Conn, f wire.Frame) {
	switch f.Type {
	case wire.FrameRenew:
		var r wire.Renewed
		if json.Unmarshal(f.Body, &r) == nil {
			_ = send(ctx, conn, wire.FrameAnswer, f.ID, g.renew(ctx, r.Session, r.Token))
		}
	case wire.FrameEnd:
		var e wire.End
		if json.Unmarshal(f.Body, &e) == nil && g.drop(e.Session) {
			_ = send(ctx, conn, wire.FrameEnd, 0, wire.End{Session: e.Session, Reason: e.Reason})
		}
	}
}

// admit verifies an offer and takes the session.
func (g *gateway) admit(ctx context.Context, o offer) wire.Answer {
	if o.Session != o.Key.SessionID() {
		return g.refuse(problem.New(problem.BadRequest, "the offer names a session that is not its key's", "report this"))
	}
	if err := g.verify(ctx, o.Key, o.Token); err != nil {
		return g.refuse(err)
	}
	now := time.Now()
	lease := wire.Lease{Expires: now.Add(time.Duration(o.Lease)), Ends: now.Add(time.Duration(o.MaxSession))}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held.take(o, lease)
	return wire.Answer{Lease: &lease, Gateway: &wire.Gateway{
		Name: g.hello.Name, Key: g.hello.Key, Addresses: g.welcome.Addresses, Candidates: g.hello.Candidates,
	}}
}

// renew verifies a fresh token of a session and gives it another lease.
func (g *gateway) renew(ctx context.Context, id string, token wire.Secret) wire.Answer {
	g.mu.Lock()
	k, ok := g.held.by[idOf(id)]
	g.mu.Unlock()
	if !ok {
		return g.refuse(problem.New(problem.SessionUnknown, "no such session here", "join again"))
	}
	if err := g.verify(ctx, k.key, token); err != nil {
		return g.refuse(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	expires := time.Now().Add(leaseFor)
	k.expires = expires.UnixNano()
	g.held.by[idOf(id)] = k
	return wire.Answer{Lease: &wire.Lease{Expires: expires, Ends: time.Unix(0, k.ends)}}
}

func (g *gateway) verify(ctx context.Context, key wire.Key, token wire.Secret) error {
	_, err := g.p.verifier.Verify(ctx, token.Reveal(), wire.Audience(g.p.opts.URL, key))
	if err == nil {
		g.verified.Add(1)
	}
	return err
}

func (g *gateway) refuse(err error) wire.Answer {
	g.refused.Add(1)
	doc, _ := json.Marshal(problem.From(err)) // strings alone: it always encodes
	return wire.Answer{Problem: doc}
}

func (g *gateway) drop(id string) (held bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held.drop(id)
}

// pass renews a session as through the tunnel: the gateway judges the token and tells the coordinator.
func (g *gateway) pass(ctx context.Context, id string, token wire.Secret) error {
	a := g.renew(ctx, id, token)
	if a.Problem != nil {
		var p problem.Error
		if err := json.Unmarshal(a.Problem, &p); err != nil {
			return err
		}
		return &p
	}
	r := wire.Renewed{Session: id, Token: token, Lease: a.Lease}
	g.mu.Lock()
	conn := g.conn
	g.mu.Unlock()
	if conn == nil || send(ctx, conn, wire.FrameRenewed, 0, r) != nil {
		g.mu.Lock()
		g.unsaid[id] = r
		g.mu.Unlock()
	}
	return nil
}

// sayAgain sends the renewals that came while there was no stream: a hello that was on its way by then does not tell of them.
func (g *gateway) sayAgain(ctx context.Context, conn *websocket.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, r := range g.unsaid {
		if send(ctx, conn, wire.FrameRenewed, 0, r) != nil {
			return // the next stream's
		}
		delete(g.unsaid, id)
	}
}

func send(ctx context.Context, conn *websocket.Conn, t wire.FrameType, id uint64, body any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return conn.Write(ctx, websocket.MessageText, wire.Frame{Type: t, ID: id, Body: raw}.Encode())
}
