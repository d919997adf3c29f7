package server

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestGatewayEnrolment(t *testing.T) {
	r := newRig(t, Options{})
	bearer := func(token string) func(o *apitest.Options) {
		return func(o *apitest.Options) { o.Credential = "Bearer " + token }
	}
	for _, c := range []struct {
		name string
		edit func(o *apitest.Options)
		want problem.Code // "" is let in
	}{
		{"secret", func(o *apitest.Options) {}, ""},
		{"network left out", func(o *apitest.Options) { o.Network = "" }, ""},
		{"identity", bearer(r.kube.ServiceAccount(publicURL, "culvert", "gateway")), ""},
		{"wrong secret", func(o *apitest.Options) { o.Credential = "Enrol wrong" }, problem.Unauthorized},
		{"no secret", func(o *apitest.Options) { o.Credential = "Enrol " }, problem.Unauthorized},
		{"endless secret", func(o *apitest.Options) { o.Credential = "Enrol " + strings.Repeat("x", 4096) }, problem.Unauthorized},
		{"no credential", func(o *apitest.Options) { o.Credential = "" }, problem.Unauthorized},
		{"no such network", func(o *apitest.Options) { o.Network = "nowhere" }, problem.Unauthorized},
		{"another service account", bearer(r.kube.ServiceAccount(publicURL, "culvert", "other")), problem.Unauthorized},
		{"another audience", bearer(r.kube.ServiceAccount("https://other.test", "culvert", "gateway")), problem.TokenAudience},
		{"a job's issuer", bearer(r.issuer.ServiceAccount(publicURL, "culvert", "gateway")), problem.TokenIssuer},
		{"forged", bearer(r.kube.Forge(claimstest.OtherKey, publicURL, map[string]any{"sub": "system:serviceaccount:culvert:gateway"})), problem.TokenInvalid},
		{"oversized", bearer(strings.Repeat("x", wire.MaxToken+1)), problem.TooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, err := r.dial(c.edit)
			if err == nil {
				g.Close()
			}
			wantCode(t, err, c.want)
		})
	}
}

// TestGatewaysIssuerAdmitsNoJobs: who may be a gateway may not therefore send jobs.
func TestGatewaysIssuerAdmitsNoJobs(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	j := r.job()
	req := j.request()
	req.Token = wire.Secret(r.kube.Sign(wire.Audience(publicURL, j.key), j.claims))
	wantCode(t, r.call(http.MethodPost, wire.PathSessions, "", req, nil), problem.TokenIssuer)
}

func TestHelloRefused(t *testing.T) {
	r := newRig(t, Options{API: quick})
	for name, edit := range map[string]func(h *wire.Hello){
		"version":    func(h *wire.Hello) { h.Version = 2 },
		"instance":   func(h *wire.Hello) { h.Instance = "a.b*c>" },
		"short id":   func(h *wire.Hello) { h.Instance = "x" },
		"key":        func(h *wire.Hello) { h.Key = wire.Key{} },
		"name":       func(h *wire.Hello) { h.Name = strings.Repeat("x", 200) },
		"no name":    func(h *wire.Hello) { h.Name = "\x1b\n" },
		"candidates": func(h *wire.Hello) { h.Candidates = make([]wire.Candidate, wire.MaxCandidates+1) },
		"session id": func(h *wire.Hello) { h.Sessions = []wire.Held{{Session: "$KV.>"}} },
		"rule": func(h *wire.Hello) {
			h.Sessions = []wire.Held{{Session: h.Key.SessionID(), Rules: []string{strings.Repeat("x", 2000)}}}
		},
	} {
		_, err := r.dial(func(o *apitest.Options) { edit(&o.Hello) })
		if problem.CodeOf(err) != problem.Incompatible {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if n := len(r.server.store.Gateways("corp")); n != 0 {
		t.Errorf("%d gateways are live", n)
	}
}

func TestNoWebSocket(t *testing.T) {
	r := newRig(t, Options{})
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url()+wire.PathGateway, nil)
	req.Header.Set("Authorization", "Enrol "+enrolSecret)
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if p := problem.Read(resp); p.Code != problem.BadRequest {
		t.Errorf("%s %+v", resp.Status, p)
	}
}

// TestSilentHello: who upgrades and says nothing is not waited for, and does not hold up a stop.
func TestSilentHello(t *testing.T) {
	r := newRig(t, Options{API: api.Options{HelloTimeout: time.Hour}})
	header := http.Header{"Authorization": {"Enrol " + enrolSecret}, wire.HeaderNetwork: {"corp"}}
	client := &http.Client{Transport: r.client.Transport}
	conn, _, err := websocket.Dial(t.Context(), r.url()+wire.PathGateway, &websocket.DialOptions{HTTPHeader: header, HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.CloseNow() }()
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("stopping took %s", took)
	}
}

func TestGatewayDisappears(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	g.Cut()
	r.eventually("the gateway is gone", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	_, err := r.job().join()
	wantCode(t, err, problem.NoGateway)
}

func TestLeavingGatewayGetsNoJobs(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	s := r.job().mustJoin()
	if err := g.Send(t.Context(), wire.FrameLeaving, 0, struct{}{}); err != nil {
		t.Fatal(err)
	}
	r.eventually("it is left out", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	_, err := r.job().join()
	wantCode(t, err, problem.NoGateway)
	if err := r.call(http.MethodPatch, wire.PathSessions+"/"+s.ID, s.Secret.Reveal(), wire.Update{}, nil); err != nil {
		t.Errorf("its sessions do not go on: %v", err)
	}
}

func TestGatewayMoves(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	next := hello("elsewhere").Candidates
	next[0].Kind = wire.Public
	if err := g.Send(t.Context(), wire.FrameCandidates, 0, wire.Trickle{Candidates: next}); err != nil {
		t.Fatal(err)
	}
	r.eventually("joins are told", func() bool {
		p := r.server.store.Gateways("corp")
		return len(p) == 1 && slices.Equal(p[0].Candidates, next)
	})
}

// TestHelloIsCleaned: of what a gateway says of itself, only what is of use gets into the state.
func TestHelloIsCleaned(t *testing.T) {
	r := newRig(t, Options{})
	good := hello("east").Candidates[0]
	bad := []wire.Candidate{
		{Kind: wire.Observed, Addr: good.Addr}, {Kind: "relay", Addr: good.Addr}, {Kind: "\x1b[2J", Addr: good.Addr}, {Kind: wire.Host},
		{Kind: wire.Host, Addr: netip.MustParseAddrPort("0.0.0.0:1")}, {Kind: wire.Host, Addr: netip.MustParseAddrPort("224.0.0.1:1")},
		{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.1:0")}, {Kind: wire.Host, Addr: netip.MustParseAddrPort("[fe80::1%eth0]:1")},
	}
	g := r.gateway(func(o *apitest.Options) {
		o.Hello.Name, o.Hello.Mapping = "ea\x1bst\n", "sideways"
		o.Hello.Candidates = append(slices.Clone(bad), good)
	})
	p := r.server.store.Gateways("corp")[0]
	if p.Name != "east" || p.Mapping != wire.MappingUnknown || !slices.Equal(p.Candidates, []wire.Candidate{good}) {
		t.Errorf("the state has %+v", p)
	}
	if err := g.Send(t.Context(), wire.FrameCandidates, 0, wire.Trickle{Candidates: append(bad, good, good), Mapping: wire.MappingHard}); err != nil {
		t.Fatal(err)
	}
	r.eventually("it has moved", func() bool {
		p := r.server.store.Gateways("corp")[0]
		return p.Mapping == wire.MappingHard && slices.Equal(p.Candidates, []wire.Candidate{good, good})
	})
}

// TestLargeHello: a hello with many sessions is longer than any other frame may be.
func TestLargeHello(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway(func(o *apitest.Options) {
		for range 5000 {
			h := wire.Held{Session: strings.Repeat("A", 22), Key: o.Hello.Key, Rules: []string{strings.Repeat("r", 1000)}}
			h.Addresses = []netip.Addr{netip.MustParseAddr("198.18.0.10"), netip.MustParseAddr("fd63:756c:7665:7274::c612:a")}
			o.Hello.Sessions = append(o.Hello.Sessions, h) // none of them is adopted: it is not the key's id
		}
	})
	if n := len(g.Welcome.End); n != 5000 {
		t.Errorf("%d sessions are over", n)
	}
}

// TestLeftAndGone: a gateway that leaves in good order is not logged as a failure.
func TestLeftAndGone(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	g.Close()
	r.eventually("it has left", func() bool { return strings.Contains(r.log.String(), "gateway left") })
	g = r.gateway()
	if err := g.Send(t.Context(), wire.FrameLeaving, 0, struct{}{}); err != nil {
		t.Fatal(err)
	}
	r.eventually("it is leaving", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	g.Cut()
	r.eventually("it has left", func() bool { return strings.Count(r.log.String(), "gateway left") == 2 })
	if strings.Contains(r.log.String(), "gateway disconnected") {
		t.Errorf("log:\n%s", r.log)
	}
}

// TestEndIsLoggedOnce: the gateway confirms an end that it was told of, and that is not an end of its own.
func TestEndIsLoggedOnce(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	for i := range 20 {
		s := r.job().mustJoin()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for len(g.Frames(wire.FrameEnd)) <= i {
				select {
				case <-t.Context().Done():
					return
				case <-time.After(50 * time.Microsecond):
				}
			}
			_ = g.Send(t.Context(), wire.FrameEnd, 0, wire.End{Session: s.ID, Reason: "told to"})
		}()
		if err := r.call(http.MethodDelete, wire.PathSessions+"/"+s.ID, s.Secret.Reveal(), nil, nil); err != nil {
			t.Fatal(err)
		}
		<-done
		r.eventually("the lease is free", func() bool {
			_, err := r.server.store.Lease(t.Context(), s.ID)
			return err != nil
		})
		if n := strings.Count(r.log.String(), "session ended\" session="+s.ID); n != 1 {
			t.Fatalf("session %d: its end is logged %d times:\n%s", i, n, r.log)
		}
	}
}

// TestLeastBusyFirst spreads sessions over gateways.
func TestLeastBusyFirst(t *testing.T) {
	r := newRig(t, Options{})
	east := r.gateway()
	west := r.gateway(func(o *apitest.Options) { o.Hello = hello("west") })
	for i := range 6 {
		r.job().mustJoin()
		r.eventually("the load shows", func() bool {
			n := 0
			for _, p := range r.server.store.Gateways("corp") {
				n += p.Sessions
			}
			return n == i+1
		})
	}
	if e, w := len(east.Frames(wire.FrameOffer)), len(west.Frames(wire.FrameOffer)); e != 3 || w != 3 {
		t.Errorf("%d and %d sessions", e, w)
	}
}

// TestReconnect: the same instance dials again; the new stream takes over, sessions stay, ended ones are listed.
func TestReconnect(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	jobs := []*job{r.job(), r.job()}
	stays, ends := jobs[0].mustJoin(), jobs[1].mustJoin()
	h := hello("east")
	for i, s := range []wire.Session{stays, ends} {
		h.Sessions = append(h.Sessions, wire.Held{Session: s.ID, Key: jobs[i].key, Addresses: s.Addresses, Expires: s.Expires, Ends: s.Ends})
	}
	unknown := wire.Held{Session: r.job().key.SessionID(), Key: r.job().key, Expires: stays.Expires, Ends: stays.Ends}
	h.Sessions = append(h.Sessions, unknown)
	if err := r.call(http.MethodDelete, wire.PathSessions+"/"+ends.ID, ends.Secret.Reveal(), nil, nil); err != nil {
		t.Fatal(err)
	}
	again, err := r.dial(func(o *apitest.Options) { o.Hello = h })
	if err != nil {
		t.Fatal(err)
	}
	defer again.Cut()
	<-g.Done()
	if want := []string{ends.ID, unknown.Session}; !slices.Equal(again.Welcome.End, want) {
		t.Errorf("over: %v, want %v", again.Welcome.End, want)
	}
	if w := again.Welcome; w.Network != "corp" || len(w.Addresses) != 2 || len(w.STUN) != 2 || len(w.Relays) != 1 {
		t.Errorf("welcome %+v", w)
	}
	r.eventually("it serves", func() bool {
		return r.call(http.MethodPatch, wire.PathSessions+"/"+stays.ID, stays.Secret.Reveal(), wire.Update{Token: jobs[0].token()}, nil) == nil
	})
	if n := len(again.Frames(wire.FrameRenew)); n != 1 {
		t.Errorf("the new stream got %d renewals", n)
	}
	r.eventually("one gateway is live", func() bool { return len(r.server.store.Gateways("corp")) == 1 })
}

// TestInstanceTheft: another gateway cannot push one off its stream by naming its instance.
func TestInstanceTheft(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	_, err := r.dial(func(o *apitest.Options) { o.Hello.Key = hello("thief").Key })
	if err == nil || websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
		t.Errorf("got %v", err)
	}
	select {
	case <-g.Done():
		t.Error("the first gateway lost its stream")
	default:
	}
}

func TestGatewayRenewsAndEnds(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	j := r.job()
	s := j.mustJoin()
	l, _ := r.server.store.Lease(t.Context(), s.ID)
	l.Expires = time.Now().Add(time.Minute)
	if _, err := r.server.store.UpdateLease(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if err := g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: j.token()}); err != nil {
		t.Fatal(err)
	}
	r.eventually("the lease is extended", func() bool {
		l, err := r.server.store.Lease(t.Context(), s.ID)
		return err == nil && time.Until(l.Expires) > 9*time.Minute
	})
	if err := g.Send(t.Context(), wire.FrameEnd, 0, wire.End{Session: s.ID, Reason: "lease over"}); err != nil {
		t.Fatal(err)
	}
	r.eventually("the lease is freed", func() bool { _, err := r.server.store.Lease(t.Context(), s.ID); return err != nil })
	// A session that is not known here: the gateway is asked to say all that it holds.
	if err := g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: j.token()}); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	if websocket.CloseStatus(g.Err()) != websocket.StatusServiceRestart {
		t.Errorf("got %v", g.Err())
	}
}

func TestRubbishFromGateway(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	for _, f := range []wire.Frame{
		{Type: "news", Body: json.RawMessage(`{}`)},
		{Type: wire.FrameAnswer, ID: 4711, Body: json.RawMessage(`{}`)},
		{Type: wire.FrameRenewed, Body: json.RawMessage(`[]`)},
		{Type: wire.FrameEnd},
		{Type: wire.FrameEnd, Body: json.RawMessage(`{"session": "$KV.>"}`)},
		{Type: wire.FrameCandidates, Body: json.RawMessage(`7`)},
	} {
		if err := g.Send(t.Context(), f.Type, f.ID, f.Body); err != nil {
			t.Fatal(err)
		}
	}
	r.job().mustJoin() // the stream survives all that
	if err := g.SendRaw(t.Context(), []byte("not a frame")); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	if websocket.CloseStatus(g.Err()) != websocket.StatusUnsupportedData {
		t.Errorf("got %v", g.Err())
	}
}

func TestOversizedFrame(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	_ = g.SendRaw(t.Context(), append([]byte(`{"type":"of the future"}`), bytes.Repeat([]byte(" "), wire.MaxFrame)...)) // fine but for its length
	<-g.Done()
	r.eventually("it is gone", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
}

// TestDeadPeer: a gateway that answers no ping loses its stream.
func TestDeadPeer(t *testing.T) {
	r := newRig(t, Options{API: api.Options{PingEvery: 100 * time.Millisecond}})
	r.gateway(func(o *apitest.Options) { o.Deaf = true })
	r.eventually("it is gone, and why is logged", func() bool {
		return strings.Contains(r.log.String(), "no answer to pings") && len(r.server.store.Gateways("corp")) == 0
	})
}

// TestSlowGatewayHoldsUpNobody: it does not read; its queue fills up and it is dropped, while another serves on.
func TestSlowGatewayHoldsUpNobody(t *testing.T) {
	r := newRig(t, Options{API: api.Options{PingEvery: time.Hour, AnswerTimeout: 10 * time.Second, Queue: 4}})
	narrow := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, network, addr)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetReadBuffer(4096)
		}
		return c, err
	}}
	defer narrow.CloseIdleConnections()
	r.gateway(func(o *apitest.Options) { o.Deaf, o.Client = true, &http.Client{Transport: narrow} })
	slow := r.server.store.Gateways("corp")[0].Instance
	fill := []byte(`{"type":"candidates","body":{"session":"` + strings.Repeat("x", 500<<10) + `"}}`)
	r.eventually("the slow gateway is dropped", func() bool {
		_, err := r.server.store.Ask(t.Context(), slow, fill)
		return err != nil || len(r.server.store.Gateways("corp")) == 0
	})
	r.eventually("it is gone", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	r.gateway(func(o *apitest.Options) { o.Hello = hello("west") })
	r.job().mustJoin()
}
