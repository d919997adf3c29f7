package server

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestJoinRenewEnd(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	j := r.job()
	s := j.mustJoin()
	if s.Network != "corp" || len(s.Addresses) != 2 || s.Gateways[0].Name != "east" || s.Gateways[0].Addresses[0].String() != "198.18.0.1" {
		t.Errorf("session %+v", s)
	}
	path := wire.PathSessions + "/" + s.ID
	var lease wire.Lease
	if err := r.call(http.MethodPatch, path, s.Secret.Reveal(), wire.Update{Token: j.token()}, &lease); err != nil {
		t.Fatal(err)
	}
	if len(g.Frames(wire.FrameRenew)) != 1 || lease.Expires.IsZero() {
		t.Errorf("lease %+v", lease)
	}
	trickle := wire.Update{Candidates: hello("x").Candidates}
	if err := r.call(http.MethodPatch, path, s.Secret.Reveal(), trickle, &lease); err != nil {
		t.Fatal(err)
	}
	r.eventually("the gateway has the candidates", func() bool { return len(g.Frames(wire.FrameCandidates)) == 1 })
	if err := r.call(http.MethodDelete, path, s.Secret.Reveal(), nil, nil); err != nil {
		t.Fatal(err)
	}
	r.eventually("the gateway is told of the end", func() bool { return len(g.Frames(wire.FrameEnd)) == 1 })
	wantCode(t, r.call(http.MethodPatch, path, s.Secret.Reveal(), wire.Update{Token: j.token()}, nil), problem.SessionOver)
}

// TestStreamedJoin: the first line arrives while the gateway still thinks.
func TestStreamedJoin(t *testing.T) {
	r := newRig(t, Options{})
	proceed := make(chan struct{})
	r.gateway(func(o *apitest.Options) {
		o.Answer = func(g *apitest.Gateway, f wire.Frame) *wire.Answer { <-proceed; return g.Accept(f) }
	})
	resp, lines, err := r.job().stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != wire.MediaEvents {
		t.Fatalf("%s %v", resp.Status, resp.Header)
	}
	first := nextEvent(t, lines)
	if first.Admitted == nil || first.Session != nil || first.Admitted.Gateways[0].Key != hello("east").Key {
		t.Fatalf("first line %+v", first)
	}
	close(proceed)
	last := nextEvent(t, lines)
	if last.Session == nil || last.Session.Secret != first.Admitted.Secret || lines.Scan() {
		t.Fatalf("last line %+v", last)
	}
}

func TestStreamedJoinRefusedByGateway(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway(func(o *apitest.Options) {
		o.Answer = func(*apitest.Gateway, wire.Frame) *wire.Answer {
			doc, _ := json.Marshal(problem.New(problem.GatewayRefused, "not by my pins", "ask"))
			return &wire.Answer{Problem: doc}
		}
	})
	resp, lines, err := r.job().stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	nextEvent(t, lines)
	var p problem.Error
	if err := json.Unmarshal(nextEvent(t, lines).Problem, &p); err != nil || p.Code != problem.GatewayRefused || p.Message != "not by my pins" {
		t.Errorf("got %+v, %v", p, err)
	}
}

// TestStreamedJoinDenied: what is refused before the first line has its own status.
func TestStreamedJoinDenied(t *testing.T) {
	r := newRig(t, Options{})
	j := r.job()
	j.claims["ref"] = "refs/heads/x"
	resp, _, err := j.stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p := problem.Read(resp)
	if resp.StatusCode != http.StatusForbidden || p.Code != problem.Denied || p.Denial == nil || p.Denial.Claim != "ref" {
		t.Errorf("%s: %+v", resp.Status, p)
	}
}

func TestClientGoneMidJoinFreesTheLease(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway(func(o *apitest.Options) {
		o.Answer = func(*apitest.Gateway, wire.Frame) *wire.Answer { return nil }
	})
	j := r.job()
	resp, lines, err := j.stream()
	if err != nil {
		t.Fatal(err)
	}
	nextEvent(t, lines)
	_ = resp.Body.Close()
	r.eventually("the gateway is told to forget", func() bool { return len(g.Frames(wire.FrameEnd)) == 1 })
	r.eventually("the lease is freed", func() bool {
		_, err := r.server.store.Lease(t.Context(), j.key.SessionID())
		return err != nil
	})
}

func TestManyJoinsAtOnce(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	r.gateway(func(o *apitest.Options) { o.Hello = hello("west") })
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]bool{}
	for range 64 {
		j := r.job()
		wg.Go(func() {
			s, err := j.join()
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[s.Addresses[0].String()] {
				t.Errorf("%v, %v", s.Addresses, err)
				return
			}
			seen[s.Addresses[0].String()] = true
		})
	}
	wg.Wait()
	if len(seen) != 64 {
		t.Errorf("%d addresses for 64 sessions", len(seen))
	}
}

func TestSecretOfSomeoneElse(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	mine, theirs := r.job().mustJoin(), r.job().mustJoin()
	var answers []string
	for _, path := range []string{theirs.ID, "AAAAAAAAAAAAAAAAAAAAAA", "x"} {
		for _, secret := range []string{mine.Secret.Reveal(), "", strings.Repeat("x", 4000)} {
			for _, method := range []string{http.MethodPatch, http.MethodDelete} {
				resp, err := r.do(method, wire.PathSessions+"/"+path, secret, "", strings.NewReader("{}"))
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				answers = append(answers, resp.Status+string(body))
			}
		}
	}
	for _, a := range answers {
		if a != answers[0] || !strings.Contains(a, string(problem.SessionUnknown)) {
			t.Errorf("answers differ: %q, %q", a, answers[0])
		}
	}
}

func TestBodies(t *testing.T) {
	r := newRig(t, Options{API: quick})
	for _, c := range []struct {
		name, body string
		want       problem.Code
	}{
		{"empty", "", problem.BadRequest},
		{"no JSON", "hello", problem.BadRequest},
		{"two values", "{} {}", problem.BadRequest},
		{"wrong type", `{"token": 1}`, problem.BadRequest},
		{"bad key", `{"key": "x"}`, problem.BadRequest},
		{"too large", `{"token": "` + strings.Repeat("x", wire.MaxBody) + `"}`, problem.TooLarge},
	} {
		resp, err := r.do(http.MethodPost, wire.PathSessions, "", "", strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		p := problem.Read(resp)
		_ = resp.Body.Close()
		if p.Code != c.want || resp.Header.Get("Content-Type") != problem.MediaType || resp.StatusCode != c.want.Status() {
			t.Errorf("%s: %s %+v", c.name, resp.Status, p)
		}
	}
}

// TestSlowBody: a body that never comes is not waited for.
func TestSlowBody(t *testing.T) {
	r := newRig(t, Options{API: quick})
	pr, pw := io.Pipe()
	defer pw.Close()
	go func() { _, _ = pw.Write([]byte(`{"token": "`)) }()
	resp, err := r.do(http.MethodPost, wire.PathSessions, "", "", pr)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if p := problem.Read(resp); p.Code != problem.BadRequest || !strings.Contains(p.Message, "in time") {
		t.Errorf("got %+v", p)
	}
}

// TestLongJoinIsNotCut: limits on slow clients do not touch a join whose gateway takes its time.
func TestLongJoinIsNotCut(t *testing.T) {
	r := newRig(t, Options{API: quick})
	r.gateway(func(o *apitest.Options) {
		o.Answer = func(g *apitest.Gateway, f wire.Frame) *wire.Answer {
			time.Sleep(3 * quick.BodyTimeout)
			return g.Accept(f)
		}
	})
	resp, lines, err := r.job().stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	nextEvent(t, lines)
	if e := nextEvent(t, lines); e.Session == nil {
		t.Errorf("got %+v", e)
	}
}

func TestHugeHeader(t *testing.T) {
	r := newRig(t, Options{})
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url()+wire.PathInfo, nil)
	req.Header.Set("Authorization", strings.Repeat("x", 64<<10))
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %s", resp.Status)
	}
}

func TestPathsAndMethods(t *testing.T) {
	r := newRig(t, Options{})
	for _, c := range []struct {
		method, path string
		want         problem.Code
		allow        string
	}{
		{http.MethodGet, "/", problem.NotFound, ""},
		{http.MethodGet, "/v1/nothing", problem.NotFound, ""},
		{http.MethodGet, wire.PathSessions, problem.WrongMethod, "POST"},
		{http.MethodPut, wire.PathSessions + "/x", problem.WrongMethod, "PATCH, DELETE"},
		{http.MethodDelete, wire.PathInfo, problem.WrongMethod, "GET"},
		{http.MethodGet, wire.PathGateway, problem.Unauthorized, ""},
	} {
		resp, err := r.do(c.method, c.path, "", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		p := problem.Read(resp)
		_ = resp.Body.Close()
		if p.Code != c.want || resp.StatusCode != c.want.Status() || resp.Header.Get("Content-Type") != problem.MediaType {
			t.Errorf("%s %s: %s %+v", c.method, c.path, resp.Status, p)
		}
		if allow := strings.Join(resp.Header.Values("Allow"), ", "); allow != c.allow {
			t.Errorf("%s %s: Allow %q, want %q", c.method, c.path, allow, c.allow)
		}
		for _, h := range []string{"X-Content-Type-Options", "Content-Security-Policy", "Strict-Transport-Security", "Referrer-Policy"} {
			if resp.Header.Get(h) == "" {
				t.Errorf("%s %s: no %s", c.method, c.path, h)
			}
		}
	}
}

func TestInfoAndHealth(t *testing.T) {
	r := newRig(t, Options{})
	var info wire.Info
	if err := r.call(http.MethodGet, wire.PathInfo, "", nil, &info); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(r.server.STUNAddr().String())
	own := wire.Relay{Name: "coordinator", UDP: ":" + port, URL: publicURL + wire.PathRelay}
	if info.Version != wire.Version || len(info.STUN) != 2 || info.STUN[0] != ":"+port || !slices.Equal(info.Relays, []wire.Relay{own}) {
		t.Errorf("info %+v, STUN is at %s", info, r.server.STUNAddr())
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if err := r.call(http.MethodGet, path, "", nil, nil); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	r.server.api.Drain()
	if err := r.call(http.MethodGet, "/healthz", "", nil, nil); err != nil {
		t.Errorf("draining: %v", err)
	}
	wantCode(t, r.call(http.MethodGet, "/readyz", "", nil, nil), problem.Unreachable)
	_, err := r.job().join()
	wantCode(t, err, problem.Unreachable)
	_, err = r.dial()
	wantCode(t, err, problem.Unreachable)
}

// TestRateLimit: the bucket is emptied before any signature is verified.
func TestRateLimit(t *testing.T) {
	r := newRig(t, Options{API: api.Options{Rate: 0.001, Burst: 3}})
	for range 3 {
		wantCode(t, r.call(http.MethodPost, wire.PathSessions, "", wire.JoinRequest{}, nil), problem.BadRequest)
	}
	raw, _ := json.Marshal(r.job().request())
	resp, err := r.do(http.MethodPost, wire.PathSessions, "", "", bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if p := problem.Read(resp); p.Code != problem.RateLimited || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%s %+v", resp.Status, p)
	}
	if err := r.call(http.MethodGet, "/healthz", "", nil, nil); err != nil {
		t.Errorf("health checks are limited too: %v", err)
	}
}

// TestGracefulStop: a join that is on its way is finished, then the gateway is told that we go away.
func TestGracefulStop(t *testing.T) {
	r := newRig(t, Options{})
	asked, proceed := make(chan struct{}), make(chan struct{})
	g := r.gateway(func(o *apitest.Options) {
		o.Answer = func(g *apitest.Gateway, f wire.Frame) *wire.Answer { close(asked); <-proceed; return g.Accept(f) }
	})
	resp, lines, err := r.job().stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	nextEvent(t, lines)
	<-asked
	closed := make(chan error, 1)
	server := r.server
	r.server = nil
	go func() { closed <- server.Close(context.Background()) }()
	for !server.api.Draining() {
		time.Sleep(time.Millisecond)
	}
	close(proceed)
	if e := nextEvent(t, lines); e.Session == nil {
		t.Errorf("got %+v", e)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	<-g.Done()
	if err := g.Err(); !strings.Contains(err.Error(), "StatusGoingAway") {
		t.Errorf("the gateway was told %v", err)
	}
}

// TestStopCutsWhatTakesTooLong: Close returns when its context is over, with everything closed.
func TestStopCutsWhatTakesTooLong(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway(func(o *apitest.Options) { o.Answer = func(*apitest.Gateway, wire.Frame) *wire.Answer { return nil } })
	resp, lines, err := r.job().stream()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	nextEvent(t, lines)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err = r.server.Close(ctx)
	r.server = nil
	if err == nil || !strings.Contains(err.Error(), "were cut") {
		t.Errorf("got %v", err)
	}
}
