//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// evil is a coordinator that lies. It speaks the whole API, and a test says with what.
type evil struct {
	grants  []wire.Grant // what it offers gateways
	stun    []string
	poseAs  wire.Key        // if set, the key that it names to clients instead of the gateway's
	arrived chan struct{}   // closed when a gateway is there
	once    sync.Once       // of arrived
	hello   wire.Hello      // valid after arrived
	conn    *websocket.Conn // the gateway's stream
	mu      sync.Mutex      // guards next and waiting
	next    uint64          // id of the next offer
	waiting map[uint64]chan wire.Answer
}

var evilAddrs = overlay("198.18.0.1")

// overlay gives an IPv4 overlay address and the IPv6 one that belongs to it.
func overlay(v4 string) []netip.Addr {
	a := netip.MustParseAddr(v4)
	b, v := netip.MustParseAddr("fd63:756c:7665:7274::").As16(), a.As4()
	copy(b[12:], v[:])
	return []netip.Addr{a, netip.AddrFrom16(b)}
}

// startEvil runs a lying coordinator and a real gateway that believes it is its own.
func startEvil(t *testing.T, opts stage.Options) (*stage.Stage, *evil) {
	t.Helper()
	s := scenery(t, opts)
	e := &evil{arrived: make(chan struct{}), waiting: map[uint64]chan wire.Answer{}}
	must(t, s.Serve(s.Cloud, 443, s.Authority(), e))
	e.stun = []string{netip.AddrPortFrom(s.Cloud.Addr(), 3478).String()}
	var server *nat.Server
	must(t, s.Cloud.Do(func() (err error) {
		server, err = nat.Listen(context.Background(), nat.ServerOptions{Addr: e.stun[0], Logger: slog.New(slog.DiscardHandler)})
		return err
	}))
	t.Cleanup(func() { _ = server.Close() })
	if err := s.LaunchGateway(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-e.arrived:
	case <-time.After(40 * time.Second):
		t.Fatal("the gateway does not come")
	}
	return s, e
}

func (e *evil) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET " + wire.PathInfo:
		_ = json.NewEncoder(w).Encode(wire.Info{Version: wire.Version, STUN: e.stun})
	case "GET " + wire.PathGateway:
		e.serveGateway(w, r)
	case "POST " + wire.PathSessions:
		e.serveJoin(w, r)
	default:
		problem.Write(w, problem.New(problem.NotFound, "no such resource", ""))
	}
}

func (e *evil) serveGateway(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(wire.MaxFrame)
	for {
		_, data, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		var f wire.Frame
		if json.Unmarshal(data, &f) == nil {
			e.take(r.Context(), conn, f)
		}
	}
}

func (e *evil) take(ctx context.Context, conn *websocket.Conn, f wire.Frame) {
	switch f.Type {
	case wire.FrameHello:
		var hello wire.Hello
		if json.Unmarshal(f.Body, &hello) != nil {
			return
		}
		welcome := wire.Welcome{Version: wire.Version, Network: stage.Network, Addresses: evilAddrs, STUN: e.stun}
		if send(ctx, conn, wire.FrameWelcome, 0, welcome) == nil {
			e.once.Do(func() {
				e.hello, e.conn = hello, conn
				close(e.arrived)
			})
		}
	case wire.FrameAnswer:
		var answer wire.Answer
		e.mu.Lock()
		waiting := e.waiting[f.ID]
		delete(e.waiting, f.ID)
		e.mu.Unlock()
		if waiting != nil && json.Unmarshal(f.Body, &answer) == nil {
			waiting <- answer
		}
	}
}

func send(ctx context.Context, conn *websocket.Conn, kind wire.FrameType, id uint64, body any) error {
	encoded, err := json.Marshal(body)
	if err != nil {
		return err
	}
	frame, err := json.Marshal(wire.Frame{Type: kind, ID: id, Body: encoded})
	if err != nil {
		return err
	}
	return conn.Write(ctx, websocket.MessageText, frame)
}

// offer asks the gateway and gives its answer; a problem in it is the error.
func (e *evil) offer(ctx context.Context, o wire.Offer) (*wire.Gateway, error) {
	answer := make(chan wire.Answer, 1)
	e.mu.Lock()
	e.next++
	id := e.next
	e.waiting[id] = answer
	e.mu.Unlock()
	if err := send(ctx, e.conn, wire.FrameOffer, id, o); err != nil {
		return nil, err
	}
	select {
	case a := <-answer:
		if len(a.Problem) == 0 {
			return a.Gateway, nil
		}
		var p problem.Error
		if err := json.Unmarshal(a.Problem, &p); err != nil {
			return nil, err
		}
		return nil, &p
	case <-ctx.Done():
		return nil, errors.New("the gateway does not answer the offer")
	}
}

func (e *evil) serveJoin(w http.ResponseWriter, r *http.Request) {
	var req wire.JoinRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, wire.MaxBody)).Decode(&req); err != nil {
		problem.Write(w, err)
		return
	}
	addrs := overlay("198.18.0.9")
	gateway, err := e.offer(r.Context(), wire.Offer{
		Session: req.Key.SessionID(), Key: req.Key, Token: req.Token, Addresses: addrs, Candidates: req.Candidates,
		Grants: e.grants, Lease: wire.Duration(10 * time.Minute), MaxSession: wire.Duration(time.Hour),
	})
	if err != nil {
		problem.Write(w, err)
		return
	}
	if gateway.Routes = routes(e.grants); !e.poseAs.IsZero() {
		gateway.Key = e.poseAs
	}
	session := &wire.Session{
		ID: req.Key.SessionID(), Network: stage.Network, Secret: "secret", Addresses: addrs, Gateways: []wire.Gateway{*gateway},
		Rules: []string{"lie"}, Lease: wire.Duration(10 * time.Minute),
		Expires: time.Now().Add(10 * time.Minute), Ends: time.Now().Add(time.Hour),
	}
	if r.Header.Get("Accept") != wire.MediaEvents {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(session)
		return
	}
	w.Header().Set("Content-Type", wire.MediaEvents)
	_ = json.NewEncoder(w).Encode(wire.JoinEvent{Admitted: session})
	_ = json.NewEncoder(w).Encode(wire.JoinEvent{Session: session})
}

// routes tells the client to send everything that the lie grants.
func routes(grants []wire.Grant) []netip.Prefix {
	var all []netip.Prefix
	for _, g := range grants {
		var proto, target string
		if _, err := fmt.Sscan(g.Allow, &proto, &target); err != nil {
			continue
		}
		if at, err := netip.ParseAddrPort(target); err == nil {
			all = append(all, netip.PrefixFrom(at.Addr(), 32))
		}
	}
	return all
}

// lie makes an honest offer, for the test to change.
func lie(t *testing.T, s *stage.Stage) wire.Offer {
	t.Helper()
	key := newKey(t).Public()
	return wire.Offer{
		Session: key.SessionID(), Key: key, Token: wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key), stage.Claims(nil))),
		Addresses: overlay("198.18.0.7"),
		Grants:    []wire.Grant{{Rule: "lie", Allow: "tcp " + s.Target(stage.PortHTTP)}},
		Lease:     wire.Duration(10 * time.Minute), MaxSession: wire.Duration(time.Hour),
	}
}

func TestGatewayRefusesALyingCoordinator(t *testing.T) {
	s, e := startEvil(t, stage.Options{})
	owner := map[string]any{"repository": "evil/shop", "repository_owner": "evil", "repository_owner_id": "666"}
	resign := func(o *wire.Offer, changes map[string]any) {
		o.Token = wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, o.Key), stage.Claims(changes)))
	}
	forge := func(how claimstest.Forgery) func(*wire.Offer) {
		return func(o *wire.Offer) {
			o.Token = wire.Secret(s.Issuer.Forge(how, wire.Audience(s.URL, o.Key), stage.Claims(nil)))
		}
	}
	tokens := []problem.Code{problem.TokenInvalid, problem.TokenUnknownKey, problem.TokenAudience, problem.TokenExpired}
	denied := []problem.Code{problem.Denied, problem.GatewayRefused}
	for _, tc := range []struct {
		name   string
		change func(*wire.Offer)
		want   []problem.Code
	}{
		{"forged token", forge(claimstest.OtherKey), tokens},
		{"token of a made-up key", forge(claimstest.UnknownKey), tokens},
		{"unsigned token", forge(claimstest.AlgNone), tokens},
		{"right token, another key", func(o *wire.Offer) { o.Key = newKey(t).Public(); o.Session = o.Key.SessionID() }, tokens},
		{"another owner's job", func(o *wire.Offer) { resign(o, owner) }, denied},
		{"an old token", func(o *wire.Offer) {
			resign(o, map[string]any{"iat": time.Now().Add(-time.Hour).Unix(), "exp": time.Now().Add(-55 * time.Minute).Unix()})
		}, tokens},
		{"a session id that is not the key's", func(o *wire.Offer) { o.Session = newKey(t).Public().SessionID() }, nil},
		{"the gateway's own address", func(o *wire.Offer) { o.Addresses = evilAddrs }, nil},
		{"an address that is not the overlay's", func(o *wire.Offer) { o.Addresses = []netip.Addr{s.Private.Addr()} }, nil},
		{"no grant", func(o *wire.Offer) { o.Grants = nil }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := lie(t, s)
			tc.change(&o)
			gateway, err := e.offer(timeout(t, 10*time.Second), o)
			if err == nil {
				t.Fatalf("the gateway believes it: %+v", gateway)
			}
			if code := problem.CodeOf(err); tc.want != nil && !slices.Contains(tc.want, code) {
				t.Errorf("refused with %v, want a code of %v", err, tc.want)
			}
		})
	}
	if gateway, err := e.offer(timeout(t, 10*time.Second), lie(t, s)); err != nil || gateway.Key != e.hello.Key {
		t.Errorf("the honest offer: %+v, %v", gateway, err)
	}
}

// With a policy of its own the gateway gives no more than that, whatever it is offered.
func TestGatewayPolicyBoundsALyingCoordinator(t *testing.T) {
	s, e := startEvil(t, stage.Options{Policy: func(s *stage.Stage) string { return "rules:\n" + s.DefaultRules() }})
	e.grants = []wire.Grant{
		{Rule: "lie", Allow: "tcp " + s.Target(stage.PortHTTP)},
		{Rule: "lie", Allow: "tcp " + s.Target(stage.PortOther)},
	}
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)); err != nil || got != stage.Greeting {
		t.Fatalf("what both give: %q, %v", got, err)
	}
	refused(t, s.Runner, s.Target(stage.PortOther))

	o := lie(t, s)
	o.Token = wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, o.Key), stage.Claims(map[string]any{"repository": "acme/other"})))
	if gateway, err := e.offer(timeout(t, 10*time.Second), o); err == nil {
		t.Errorf("another repository of the same owner is admitted: %+v", gateway)
	}
}

// A runner that pins the gateway's key does not talk to a coordinator's own.
func TestPinnedRunnerRefusesAnotherGateway(t *testing.T) {
	s, e := startEvil(t, stage.Options{})
	e.grants = []wire.Grant{{Rule: "lie", Allow: "tcp " + s.Target(stage.PortHTTP)}}
	e.poseAs = newKey(t).Public()
	job := newJob(t, s, stage.JobOptions{})
	result := culvert(t, job, problem.GatewayKey.Exit(), "up", "--json", "--mode", "tun", "--gateway-key", e.hello.Key.String())
	if p := result.Problem(); p == nil || p.Code != problem.GatewayKey {
		t.Errorf("want %s: %s", problem.GatewayKey, result)
	}
}
