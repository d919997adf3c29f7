package session

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const rulesV1 = `
rules:
  - name: deploy
    network: corp
    match: {repository_owner_id: 9919, ref: refs/heads/main}
    allow: ["tcp 10.20.0.5:5432", "udp 10.20.0.5:53"]
    max_session: 2h
`

// testRelays are listed by every bench's coordinator.
var testRelays = []wire.Relay{
	{Name: "coordinator", UDP: ":3478", URL: "https://culvert.test/v1/relay"},
	{Name: "far", UDP: "far.culvert.test:3478"},
	{Name: "near", UDP: "near.culvert.test:3478", URL: "https://near.culvert.test/v1/relay"},
}

// bench is a manager on a real store, with an issuer and gateways that are functions.
type bench struct {
	t      *testing.T
	issuer *claimstest.Issuer
	store  *state.Store
	m      *Manager
	now    atomic.Pointer[time.Time] // nil: the real clock
	log    *lines
}

func newBench(t *testing.T, opts Options) *bench {
	t.Helper()
	b := &bench{t: t, issuer: claimstest.Start(t), log: &lines{}}
	var err error
	if b.store, err = state.Open(t.Context(), state.Options{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.store.Close() })
	opts.Store = b.store
	opts.Rules = b.rules(rulesV1)
	opts.Logger = slog.New(slog.NewTextHandler(b.log, nil))
	opts.Now = b.clock
	if opts.TicketKey == nil {
		if opts.TicketKey, err = b.store.TicketKey(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if opts.OfferTimeout == 0 {
		opts.OfferTimeout = 2 * time.Second
	}
	if b.m, err = New(opts); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) clock() time.Time {
	if at := b.now.Load(); at != nil {
		return *at
	}
	return time.Now()
}

// rules compiles a file's rules, with a verifier for the bench's issuer.
func (b *bench) rules(rules string) Rules {
	b.t.Helper()
	doc := fmt.Sprintf(`
url: https://culvert.test
tls: {cert: c, key: k}
state: {dir: d}
lease: 10m
issuers: [{url: "%s"}]
networks:
  corp: {sessions: 198.18.0.0/28, gateways: [{enrol_sha256: %s}]}
  lab: {gateways: [{enrol_sha256: %s}]}
`, b.issuer.URL(), strings.Repeat("ab", 32), strings.Repeat("cd", 32)) + rules
	cfg, err := config.Parse("culvert.yaml", []byte(doc))
	if err != nil {
		b.t.Fatal(err)
	}
	v, err := claims.New(claims.Options{Issuers: cfg.Issuers})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = v.Close() })
	return Rules{Config: cfg, Verifier: v, Relays: testRelays}
}

// job is a client with a key and the claims of its tokens.
type job struct {
	b      *bench
	key    wire.Key
	claims map[string]any
}

func (b *bench) job(more ...any) *job {
	b.t.Helper()
	private, err := wire.NewPrivateKey()
	if err != nil {
		b.t.Fatal(err)
	}
	j := &job{b, private.Public(), map[string]any{
		"repository_owner_id": "9919", "repository": "acme/shop", "repository_id": "74", "ref": "refs/heads/main",
		"event_name": "push", "run_id": "1001", "run_attempt": "1", "check_run_id": "5005",
	}}
	for i := 0; i < len(more); i += 2 {
		j.claims[more[i].(string)] = more[i+1]
	}
	return j
}

func (j *job) token() wire.Secret {
	return wire.Secret(j.b.issuer.Sign(wire.Audience("https://culvert.test", j.key), j.claims))
}

func (j *job) request() Join {
	return Join{JoinRequest: wire.JoinRequest{Network: "corp", Key: j.key, Token: j.token()}, From: netip.MustParseAddr("192.0.2.7")}
}

func (j *job) join() (wire.Session, error) { return j.b.m.Join(j.b.t.Context(), j.request()) }

func (j *job) mustJoin() wire.Session {
	j.b.t.Helper()
	s, err := j.join()
	if err != nil {
		j.b.t.Fatalf("join: %v", err)
	}
	return s
}

// gateway is a live gateway in a store.
type gateway struct {
	who    Gateway
	key    wire.Key
	answer func(wire.FrameType, json.RawMessage) *wire.Answer // nil: never answers

	mu     sync.Mutex
	frames []wire.Frame
}

// gateway makes a live gateway that takes every offer.
func (b *bench) gateway(name string) *gateway {
	b.t.Helper()
	private, err := wire.NewPrivateKey()
	if err != nil {
		b.t.Fatal(err)
	}
	g := &gateway{who: Gateway{Network: "corp", Name: name, Instance: name + "-" + strings.Repeat("i", 20)}, key: private.Public()}
	g.answer = g.accept
	stop, err := b.store.Serve(g.who.Instance, func(ctx context.Context, msg []byte) []byte { return g.handle(ctx, msg) })
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(stop)
	b.present(g)
	return g
}

func (b *bench) present(g *gateway) {
	b.t.Helper()
	p := state.Presence{Instance: g.who.Instance, Name: g.who.Name, Network: "corp", Key: g.key,
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.9:51820")}}, Mapping: wire.MappingHard}
	if err := b.store.PutPresence(b.t.Context(), p, time.Minute); err != nil {
		b.t.Fatal(err)
	}
	b.eventually("the presence shows", func() bool {
		return slices.ContainsFunc(b.store.Gateways("corp"), func(p state.Presence) bool { return p.Instance == g.who.Instance })
	})
}

// eventually waits for what the store's mirror learns a moment later.
func (b *bench) eventually(what string, ok func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("it never came to be that %s", what)
		}
	}
}

func (g *gateway) accept(t wire.FrameType, _ json.RawMessage) *wire.Answer {
	a := &wire.Answer{Lease: &wire.Lease{Expires: time.Now().Add(9 * time.Minute), Ends: time.Now().Add(time.Hour)}}
	if t == wire.FrameOffer {
		a.Gateway = &wire.Gateway{Name: g.who.Name, Key: g.key}
	}
	return a
}

func (g *gateway) refuse(code problem.Code) func(wire.FrameType, json.RawMessage) *wire.Answer {
	return func(wire.FrameType, json.RawMessage) *wire.Answer {
		doc, _ := json.Marshal(problem.New(code, "no", "next"))
		return &wire.Answer{Problem: doc}
	}
}

func (g *gateway) handle(ctx context.Context, msg []byte) []byte {
	var f wire.Frame
	_ = json.Unmarshal(msg, &f)
	g.mu.Lock()
	g.frames = append(g.frames, f)
	answer := g.answer
	g.mu.Unlock()
	if f.Type != wire.FrameOffer && f.Type != wire.FrameRenew {
		return []byte("{}")
	}
	if a := answer(f.Type, f.Body); a != nil {
		raw, _ := json.Marshal(a)
		return raw
	}
	<-ctx.Done()
	return nil
}

func (g *gateway) set(answer func(wire.FrameType, json.RawMessage) *wire.Answer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.answer = answer
}

// got gives the bodies of the frames of a type that came so far.
func got[T any](g *gateway, t wire.FrameType) []T {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []T
	for _, f := range g.frames {
		if f.Type == t {
			var v T
			_ = json.Unmarshal(f.Body, &v)
			out = append(out, v)
		}
	}
	return out
}

// lines is a log that tests can read.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func wantCode(t *testing.T, err error, want problem.Code) {
	t.Helper()
	if got := problem.CodeOf(err); got != want {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
}
