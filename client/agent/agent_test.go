package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestUpCarriesBytesAndDownEndsTheSession(t *testing.T) {
	w := agenttest.New(t)
	opts := options(t, w)
	opts.WaitFor = []string{"10.77.0.5:8080"}
	opts.Network = "corp"
	r := start(t, opts)
	ready := r.up(t)
	j := w.Joins()[0]
	if ready.Session != j.Key.SessionID() || ready.Network != "corp" || ready.Address != "198.18.0.10" || ready.Gateway != "gw" {
		t.Errorf("ready = %+v", ready)
	}
	if j.Network != "corp" || len(j.Candidates) == 0 {
		t.Errorf("the join carries network %q and %d candidates", j.Network, len(j.Candidates))
	}
	tm := ready.Timings
	if tm.Token <= 0 || tm.Connect <= 0 || tm.Join < tm.Token || tm.Handshake < tm.Join || tm.Usable < tm.Handshake || tm.Total < tm.Usable {
		t.Errorf("timings do not add up: %+v", tm)
	}
	t.Logf("timings %+v", tm)
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
	st := r.Status()
	if st.State != control.Up || st.Session != ready.Session || st.Path == nil || st.Handshake == nil || st.RxBytes == 0 ||
		!slices.Equal(st.Routes, []string{"10.77.0.0/24"}) || st.Expires == nil {
		t.Errorf("status = %+v", st)
	}
	if err := r.Down(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := <-r.result; err != nil {
		t.Errorf("Run after Down: %v", err)
	}
	if got := w.Ended(); !slices.Equal(got, []string{ready.Session}) {
		t.Errorf("ended sessions = %v", got)
	}
}

func TestOneDocumentInsteadOfAStream(t *testing.T) {
	w := agenttest.New(t)
	w.Plain = true
	r := start(t, options(t, w))
	r.up(t)
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
}

func TestChecksBeginWithTheFirstLine(t *testing.T) {
	w := agenttest.New(t)
	w.Held = make(chan struct{})
	r := start(t, options(t, w))
	for range 1000 {
		r.marks.mu.Lock()
		there := !r.marks.path.IsZero()
		r.marks.mu.Unlock()
		if there {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	select {
	case <-r.ready:
		t.Error("up before the gateway has taken the session")
	default:
	}
	if r.marks.timings().Path == 0 {
		t.Error("no path before the last line")
	}
	close(w.Held)
	r.up(t)
}

func TestProxyReachesTheService(t *testing.T) {
	w := agenttest.New(t)
	r := start(t, options(t, w))
	ready := r.up(t)
	proxyURL, err := url.Parse("http://" + ready.Proxy)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", proxyURL.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "CONNECT 10.77.0.5:8080 HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.0\r\n\r\n")
	said, err := io.ReadAll(conn)
	if err != nil || !strings.HasSuffix(string(said), "\r\n\r\nhello") {
		t.Errorf("through the proxy: %q, %v", said, err)
	}
}

func TestPermanentRefusalsEndAtOnce(t *testing.T) {
	denied := problem.New(problem.Denied, "policy says no", "ask")
	denied.Denial = &problem.Denial{Rule: "deploy", Claim: "ref", Expected: []string{"refs/heads/main"}, Got: "refs/heads/x"}
	for name, answer := range map[string]func(http.ResponseWriter){
		"as a status": func(w http.ResponseWriter) { problem.Write(w, denied) },
		"in the stream": func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", wire.MediaEvents)
			doc, _ := json.Marshal(denied)
			_ = json.NewEncoder(w).Encode(wire.JoinEvent{Problem: doc})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := agenttest.New(t)
			w.OnJoin = func(_ int, rw http.ResponseWriter) bool { answer(rw); return true }
			p := start(t, options(t, w)).failure(t)
			if p.Code != problem.Denied || p.Denial == nil || p.Denial.Got != "refs/heads/x" {
				t.Errorf("error = %v", p)
			}
			if n := len(w.Joins()); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func TestTemporaryRefusalsAreTriedAgainWithAnotherKey(t *testing.T) {
	w := agenttest.New(t)
	w.OnJoin = func(n int, rw http.ResponseWriter) bool {
		if n < 3 {
			problem.Write(rw, problem.New(problem.NoGateway, "none", ""))
		}
		return n < 3
	}
	start(t, options(t, w)).up(t)
	joins := w.Joins()
	if len(joins) != 3 || joins[0].Key == joins[1].Key || joins[1].Key == joins[2].Key || joins[0].Token == joins[1].Token {
		t.Errorf("%d joins, keys %v", len(joins), joins)
	}
}

func TestGivesUpInTime(t *testing.T) {
	w := agenttest.New(t)
	w.OnJoin = func(_ int, rw http.ResponseWriter) bool {
		problem.Write(rw, problem.New(problem.NoGateway, "no gateway is there", "start one"))
		return true
	}
	opts := options(t, w)
	opts.Timeout = 300 * time.Millisecond
	p := start(t, opts).failure(t)
	if p.Code.Exit() != problem.ExitTimeout || !strings.Contains(p.Message, "no gateway is there") || p.Next != "start one" {
		t.Errorf("error = %v", p)
	}
}

func TestNoPathSaysSo(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Deaf = true
	opts := options(t, w)
	opts.Timeout = 500 * time.Millisecond
	if p := start(t, opts).failure(t); p.Code != problem.NoPath || p.Code.Exit() != problem.ExitTimeout {
		t.Errorf("error = %v", p)
	}
	if len(w.Ended()) != 1 {
		t.Error("the session was not ended")
	}
}

func TestCancelledWhileJoining(t *testing.T) {
	w := agenttest.New(t)
	asked := make(chan struct{})
	opts := options(t, w)
	opts.Tokens = func(*http.Client) (TokenSource, error) {
		return tokenFunc(func(ctx context.Context, _ string) (wire.Secret, error) {
			close(asked)
			<-ctx.Done()
			return "", ctx.Err()
		}), nil
	}
	r := start(t, opts)
	<-asked
	if err := r.Down(context.Background()); err != nil {
		t.Fatal(err)
	}
	if p := r.failure(t); p.Code != problem.Cancelled {
		t.Errorf("error = %v", p)
	}
}

func TestPins(t *testing.T) {
	w := agenttest.New(t)
	opts := options(t, w)
	other, _ := wire.NewPrivateKey()
	opts.Pins = []wire.Key{other.Public()}
	if p := start(t, opts).failure(t); p.Code != problem.GatewayKey {
		t.Errorf("error = %v", p)
	}
	if len(w.Joins()) != 1 || len(w.Ended()) != 1 {
		t.Errorf("%d joins, %d ends", len(w.Joins()), len(w.Ended()))
	}
	opts.Pins = append(opts.Pins, w.Gateway.Key())
	start(t, opts).up(t)
}

func TestWaitForOutsideTheGrant(t *testing.T) {
	w := agenttest.New(t)
	opts := options(t, w)
	opts.WaitFor = []string{"10.78.0.1:80"}
	if p := start(t, opts).failure(t); p.Code != problem.FlowDenied || p.Code.Exit() != problem.ExitDenied {
		t.Errorf("error = %v", p)
	}
}

func TestWaitForDeniedByTheGateway(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Verdict = wire.ReachResult{Verdict: wire.FlowDenied, Reason: "no rule allows tcp 81"}
	opts := options(t, w)
	opts.WaitFor = []string{"10.77.0.5:81"}
	p := start(t, opts).failure(t)
	if p.Code != problem.FlowDenied || !strings.Contains(p.Message, "no rule allows tcp 81") {
		t.Errorf("error = %v", p)
	}
}

func TestWaitForThatNeverAnswers(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Verdict = wire.ReachResult{Verdict: wire.Unreachable, Reason: "connection refused"}
	opts := options(t, w)
	opts.WaitFor = []string{"10.77.0.5:81"}
	opts.Timeout = 8 * time.Second
	p := start(t, opts).failure(t)
	if p.Code != problem.NotUsable || !strings.Contains(p.Message, "connection refused") {
		t.Errorf("error = %v", p)
	}
}

func TestCheckAsksTheGateway(t *testing.T) {
	w := agenttest.New(t)
	r := start(t, options(t, w))
	r.up(t)
	got, err := r.Check(context.Background(), "10.77.0.5:8080")
	if err != nil || got.Verdict != wire.Reachable || got.Rule != "deploy" || got.Target != "10.77.0.5:8080" {
		t.Errorf("check = %+v, %v", got, err)
	}
	w.Gateway.Script(func(g *agenttest.Gateway) { g.Verdict.Reason = "a\n::stop-commands::x" })
	if got, err := r.Check(context.Background(), "10.77.0.5:8080"); problem.CodeOf(err) != problem.Incompatible {
		t.Errorf("a command for the runner is taken for a reason: %+v, %v", got, err)
	}
	if _, err := r.Check(context.Background(), "nonsense"); problem.CodeOf(err) != problem.Usage {
		t.Errorf("check of nonsense: %v", err)
	}
}

func TestRenewsThroughTheTunnelThoughTheCoordinatorIsAway(t *testing.T) {
	w := agenttest.New(t)
	w.Lease = 10 * time.Second // renewed at half; a busy machine may take seconds to come up
	r := start(t, options(t, w))
	r.up(t)
	w.HTTP.CloseClientConnections()
	w.HTTP.Close()
	for range 4000 {
		if len(w.Gateway.Renewals()) > 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("never renewed")
}

func TestRejoinsWhenTheGatewayForgot(t *testing.T) {
	w := agenttest.New(t)
	w.Lease = 2 * time.Second // a busy machine may take most of that to join
	first := true
	w.Gateway.OnRenew = func() (wire.Lease, error) {
		if first {
			first = false
			return wire.Lease{}, problem.New(problem.SessionUnknown, "no such session", "")
		}
		return wire.Lease{Expires: time.Now().Add(time.Hour), Ends: time.Now().Add(2 * time.Hour)}, nil
	}
	r := start(t, options(t, w))
	before := r.up(t)
	for range 3000 {
		if st := r.Status(); st.Rejoins > 0 && len(st.Addresses) > 0 {
			if st.Session == before.Session || st.Addresses[0] == before.Address {
				t.Errorf("still %s at %v", st.Session, st.Addresses)
			}
			if st.Proxy != before.Proxy {
				t.Errorf("the proxy moved from %s to %s", before.Proxy, st.Proxy)
			}
			if got := r.hello(t); got != "hello" {
				t.Errorf("the service said %q", got)
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("never rejoined: %+v", r.Status())
}

func TestRejoinsWhenThePathIsLost(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a path takes to be given up")
	}
	w := agenttest.New(t)
	r := start(t, options(t, w))
	r.up(t)
	w.Gateway.Forget()
	lost := time.Now()
	for r.Status().Rejoins == 0 {
		if time.Since(lost) > 30*time.Second {
			t.Fatalf("never rejoined: %+v", r.Status())
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("rejoined after %s", time.Since(lost))
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
}

// Where policy has ended a session, that is what the job is told, and not that its path is gone.
func TestSaysThatPolicyEndedTheSession(t *testing.T) {
	w := agenttest.New(t)
	w.OnJoin = func(n int, rw http.ResponseWriter) bool {
		if n > 1 {
			problem.Write(rw, problem.New(problem.Denied, "no rule lets this job in", "ask"))
		}
		return n > 1
	}
	r := start(t, options(t, w))
	r.up(t)
	const reason = "policy no longer gives what the session holds"
	w.End(reason)
	p := r.failure(t)
	if p.Code != problem.Denied || p.Message != "policy has ended the session: no rule lets this job in" || p.Next != "ask" {
		t.Errorf("error = %v", p)
	}
	var said []string
	for _, e := range r.Status().History {
		said = append(said, e.What)
	}
	if !slices.Contains(said, "lost the session: "+reason) {
		t.Errorf("the history is %q", said)
	}
}

func TestLateCandidatesTrickle(t *testing.T) {
	w := agenttest.New(t)
	stun, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer stun.Close()
	w.OnInfo = func() wire.Info {
		return wire.Info{Version: wire.Version, STUN: []string{stun.LocalAddr().String()}}
	}
	r := start(t, options(t, w))
	r.up(t)
	// Only now does the server answer: with an address that is like nothing else here.
	go answerSTUN(stun, netip.MustParseAddrPort("192.0.2.7:4242"))
	for range 1000 {
		for _, u := range w.Updates() {
			if slices.Contains(u.Candidates, wire.Candidate{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("192.0.2.7:4242")}) {
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the late candidate never came")
}

// answerSTUN answers Binding requests (RFC 8489) with a success response that carries XOR-MAPPED-ADDRESS.
func answerSTUN(conn *net.UDPConn, mapped netip.AddrPort) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if n < 20 {
			continue
		}
		const cookie = "\x21\x12\xa4\x42"
		ip := mapped.Addr().As4()
		for i := range ip {
			ip[i] ^= cookie[i]
		}
		port := mapped.Port() ^ 0x2112
		msg := bytes.Join([][]byte{
			{1, 1, 0, 12}, buf[4:20], {0, 0x20, 0, 8, 0, 1, byte(port >> 8), byte(port)}, ip[:],
		}, nil)
		_, _ = conn.WriteToUDPAddrPort(msg, from)
	}
}

func TestCoordinatorThatMakesNoSense(t *testing.T) {
	for name, script := range map[string]func(*wire.Session){
		"another session":          func(s *wire.Session) { s.ID = "AAAAAAAAAAAAAAAAAAAAAA" },
		"no address":               func(s *wire.Session) { s.Addresses = nil },
		"a loopback address":       func(s *wire.Session) { s.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.2")} },
		"no gateway":               func(s *wire.Session) { s.Gateways = nil },
		"a command for the runner": func(s *wire.Session) { s.Gateways[0].Name = "a\n::stop-commands::x" },
		"another as a rule's name": func(s *wire.Session) { s.Rules = []string{"a\r::debug::x"} },
		"another as the network":   func(s *wire.Session) { s.Network = "a\n::debug::x" },
		"a gateway without a key":  func(s *wire.Session) { s.Gateways[0].Key = wire.Key{} },
		"a gateway on loopback": func(s *wire.Session) {
			s.Gateways[0].Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		},
		"a route to loopback": func(s *wire.Session) {
			s.Gateways[0].Routes = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		},
		"a route with host bits": func(s *wire.Session) {
			s.Gateways[0].Routes = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := agenttest.New(t)
			w.Session = script
			if p := start(t, options(t, w)).failure(t); p.Code != problem.Incompatible {
				t.Errorf("error = %v", p)
			}
		})
	}
}

func TestOtherVersionsOfTheAPI(t *testing.T) {
	w := agenttest.New(t)
	w.OnInfo = func() wire.Info { return wire.Info{Version: wire.Version + 1} }
	opts := options(t, w)
	opts.Tokens = func(*http.Client) (TokenSource, error) {
		return tokenFunc(func(ctx context.Context, audience string) (wire.Secret, error) {
			select {
			case <-time.After(5 * time.Second):
			case <-ctx.Done():
			}
			return goodToken(ctx, audience)
		}), nil
	}
	if p := start(t, opts).failure(t); p.Code != problem.Incompatible {
		t.Errorf("error = %v", p)
	}
}

// TestLoopbackStaysOnThisHost: a route for everything must not draw what the job says to itself into the tunnel.
func TestLoopbackStaysOnThisHost(t *testing.T) {
	a := &Agent{}
	a.routes.want = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for addr, want := range map[string]bool{"127.0.0.53": false, "::1": false, "::ffff:127.0.0.1": false, "10.20.0.5": true} {
		if got := a.inside(netip.MustParseAddr(addr)); got != want {
			t.Errorf("inside(%s) = %v", addr, got)
		}
	}
}

// TestSessionsLostAtOnceAreSpaced: every session takes a token of the issuer's and a join.
func TestSessionsLostAtOnceAreSpaced(t *testing.T) {
	w := agenttest.New(t)
	w.Lease = time.Millisecond // renewed too late
	r := start(t, options(t, w))
	r.up(t)
	time.Sleep(2 * time.Second)
	if n := r.Status().Rejoins; n > 6 {
		t.Errorf("%d sessions within two seconds", n)
	}
}
