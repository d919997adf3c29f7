package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// world is everything around one gateway, on loopback.
type world struct {
	t       testing.TB
	coord   *coordinator
	issuer  *claimstest.Issuer
	service netip.AddrPort // echoes, in the private network
	opts    Options
	gateway *Gateway
	next    byte
}

func newWorld(t testing.TB, change func(*Options)) *world {
	t.Helper()
	w := &world{t: t, coord: startCoordinator(t), issuer: claimstest.Start(t), service: echoService(t)}
	w.coord.script(func(c *coordinator) { c.welcome.STUN = nil })
	w.opts = Options{
		Coordinator: w.coord.url(), Network: "corp", EnrolTokenFile: writeFile(t, "secret"), Listen: ":0", Name: "gw",
		PolicyFile: writeFile(t, strings.NewReplacer("OWNER", ownerID, "SERVICE", w.service.String()).Replace(`
rules:
  - name: own
    match: {repository_owner_id: OWNER}
    allow: ["tcp SERVICE", "tcp 10.20.0.0/24:5432"]
`)),
		Issuers: []claims.Issuer{{URL: w.issuer.URL()}}, Metrics: "127.0.0.1:0", Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&w.opts)
	}
	w.start()
	return w
}

func (w *world) start() {
	w.t.Helper()
	g, err := Start(context.Background(), w.opts)
	if err != nil {
		w.t.Fatal(err)
	}
	w.gateway = g
	w.t.Cleanup(func() {
		if err := g.Close(); err != nil {
			w.t.Errorf("close the gateway: %v", err)
		}
	})
}

// echoService is a private service that echoes what it gets.
func echoService(t testing.TB) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

// job is a client: a tunnel into a network stack.
type job struct {
	w      *world
	offer  wire.Offer
	device *netstack.Device
	tunnel *tunnel.Tunnel
	http   *http.Client
	open   net.Conn // a connection to the service, where a test has one
}

func (w *world) token(key wire.Key) wire.Secret {
	return wire.Secret(w.issuer.Sign(wire.Audience(w.coord.url(), key), map[string]any{"repository_owner_id": ownerID, "run_id": "7"}))
}

// newJob makes a job's side, without telling anybody.
func (w *world) newJob() *job {
	w.t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		w.t.Fatal(err)
	}
	w.next++
	four := [4]byte{198, 18, 3, w.next}
	six := gatewayAddrs[1].As16()
	copy(six[12:], four[:])
	addrs := []netip.Addr{netip.AddrFrom4(four), netip.AddrFrom16(six)}
	device, err := netstack.New(netstack.Options{Addresses: addrs})
	if err != nil {
		w.t.Fatal(err)
	}
	dial := tunnel.DialRelay(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, nil)
	tun, err := tunnel.New(tunnel.Options{Key: key, TUN: device, Relays: tunnel.RelayOptions{Dial: dial}})
	if err != nil {
		w.t.Fatal(err)
	}
	j := &job{w: w, device: device, tunnel: tun, offer: wire.Offer{
		Session: key.Public().SessionID(), Key: key.Public(), Token: w.token(key.Public()), Addresses: addrs,
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), tun.Port())}},
		Grants:     []wire.Grant{{Rule: "deploy", Allow: "tcp " + w.service.String()}, {Rule: "deploy", Allow: "tcp 10.0.0.0/8:1-65535"}},
		Lease:      wire.Duration(time.Minute),
	}}
	j.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: device.DialContext}}
	w.t.Cleanup(func() { j.http.CloseIdleConnections(); _ = tun.Close() })
	return j
}

// join has the coordinator offer the job and brings its tunnel up.
func (w *world) join(change func(*wire.Offer)) *job {
	w.t.Helper()
	j := w.newJob()
	if change != nil {
		change(&j.offer)
	}
	a, err := w.coord.ask(wire.FrameOffer, j.offer)
	if err != nil {
		w.t.Fatalf("offer: %v", err)
	}
	j.connect(a.Gateway)
	return j
}

func (j *job) connect(g *wire.Gateway) {
	j.w.t.Helper()
	loop := wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), j.w.gateway.Port())}
	_, err := j.tunnel.AddPeer(tunnel.PeerOptions{
		Key: g.Key, Session: j.offer.Session, Candidates: append(g.Candidates, loop), Initiate: true,
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
	})
	if err != nil {
		j.w.t.Fatal(err)
	}
	j.ping(g.Addresses[0])
}

// ping sends datagrams to the gateway's echo service until one comes back, as a client does before it calls itself connected.
func (j *job) ping(gateway netip.Addr) {
	j.w.t.Helper()
	c, err := j.device.DialContext(context.Background(), "udp", netip.AddrPortFrom(gateway, wire.EchoPort).String())
	if err != nil {
		j.w.t.Fatal(err)
	}
	defer c.Close()
	eventually(j.w.t, "bytes flow through the tunnel", func() bool {
		_, _ = c.Write([]byte("ping"))
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := c.Read(make([]byte, 16))
		return err == nil
	})
}

func (j *job) dial(target netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	return j.device.DialContext(ctx, "tcp", target.String())
}

// usable checks that the service answers through the tunnel.
func (j *job) usable() error {
	c, err := j.flow()
	if err == nil {
		err = c.Close()
	}
	return err
}

// flow opens a flow to the service over which bytes have gone both ways.
func (j *job) flow() (net.Conn, error) {
	c, err := j.dial(j.w.service)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(40 * time.Second))
	if _, err = c.Write([]byte("ping")); err == nil {
		_, err = io.ReadFull(c, make([]byte, 4))
	}
	return c, err
}

// inside asks the gateway inside the tunnel; out may be nil.
func (j *job) inside(method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequest(method, "http://"+gatewayAddrs[0].String()+path, body)
	if err != nil {
		return err
	}
	resp, err := j.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return problem.Read(resp)
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

func TestMain(m *testing.M) {
	if os.Getenv(crowdEnv) != "" {
		crowdMain()
		return
	}
	goleak.VerifyTestMain(m)
}

func TestAJobReachesTheServiceAndNothingElse(t *testing.T) {
	w := newWorld(t, nil)
	if h := w.coord.hello(); h.Key != w.gateway.Key() || h.Name != "gw" || len(h.Candidates) == 0 || h.Instance == "" {
		t.Errorf("hello %+v", h)
	}
	j := w.join(nil)
	if err := j.usable(); err != nil {
		t.Fatalf("the service: %v", err)
	}
	began := time.Now()
	other := echoService(t)
	if c, err := j.dial(other); err == nil {
		_ = c.Close()
		t.Error("reached what is not granted")
	} else if d := time.Since(began); d > 2*time.Second {
		t.Errorf("a denied flow hung for %v", d)
	}
	var me wire.InsideSession
	if err := j.inside("GET", wire.PathInsideMe, nil, &me); err != nil {
		t.Fatal(err)
	}
	if me.Session != j.offer.Session || me.Gateway != "gw" || me.Flows.Allowed == 0 || me.Flows.Denied == 0 || len(me.Grants) != 2 {
		t.Errorf("the gateway's view: %+v", me)
	}
	for target, want := range map[string]wire.Verdict{
		w.service.String(): wire.Reachable, other.String(): wire.FlowDenied, "169.254.169.254:80": wire.FlowDenied,
		"198.18.3.99:80": wire.FlowDenied,
	} {
		var res wire.ReachResult
		if err := j.inside("POST", wire.PathReach, wire.ReachRequest{Target: target}, &res); err != nil || res.Verdict != want {
			t.Errorf("reach %s: %+v, %v; want %s", target, res, err, want)
		}
	}
}

func TestEchoInsideTheTunnel(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	for _, a := range gatewayAddrs {
		c, err := j.device.DialContext(t.Context(), "udp", netip.AddrPortFrom(a, wire.EchoPort).String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(40 * time.Second))
		long, short := bytes.Repeat([]byte("x"), wire.MaxEcho+1), bytes.Repeat([]byte("y"), wire.MaxEcho)
		_, _ = c.Write(long)
		_, _ = c.Write(short)
		buf := make([]byte, 2*wire.MaxEcho)
		n, err := c.Read(buf)
		if err != nil || !bytes.Equal(buf[:n], short) {
			t.Errorf("echo of %d bytes, %v; want %d and the longer one dropped", n, err, len(short))
		}
		_ = c.Close()
	}
}

// TestRefusalsOverTheStream has the lies that need a running stream; the door's tests have the rest.
func TestRefusalsOverTheStream(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	good := w.join(nil)
	for name, c := range map[string]struct {
		tell func(*wire.Offer)
		code problem.Code
	}{
		"forged token":          {func(o *wire.Offer) { o.Token = "a.b.c" }, problem.TokenInvalid},
		"the token of another":  {func(o *wire.Offer) { o.Token = good.offer.Token }, problem.TokenAudience},
		"address of another":    {func(o *wire.Offer) { o.Addresses[0] = good.offer.Addresses[0] }, problem.GatewayRefused},
		"the gateway's address": {func(o *wire.Offer) { o.Addresses[0] = gatewayAddrs[0] }, problem.BadRequest},
	} {
		j := w.newJob()
		c.tell(&j.offer)
		if _, err := w.coord.ask(wire.FrameOffer, j.offer); problem.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if _, err := w.coord.ask(wire.FrameOffer, "nonsense"); problem.CodeOf(err) != problem.BadRequest {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := w.coord.ask(wire.FrameRenew, wire.Renewed{Session: "nobody"}); problem.CodeOf(err) != problem.SessionUnknown {
		t.Errorf("renewal of nobody: %v", err)
	}
	w.coord.send(frame("gossip", 0, nil))
	w.coord.send(frame(wire.FrameCandidates, 0, wire.Trickle{Session: "nobody", Candidates: make([]wire.Candidate, 1000)}))
	if err := good.usable(); err != nil {
		t.Errorf("the honest session suffers: %v", err)
	}
}

func TestRenewsThroughTheTunnelWithoutACoordinator(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	eventually(t, "the stream is up", w.gateway.stream.up)
	w.coord.stop()
	eventually(t, "the gateway notices", func() bool { return !w.gateway.stream.up() })

	fresh := w.token(j.offer.Key)
	var lease wire.Lease
	if err := j.inside("POST", wire.PathRenew, wire.InsideRenew{Token: fresh}, &lease); err != nil {
		t.Fatal(err)
	}
	if left := time.Until(lease.Expires); left < 50*time.Second {
		t.Errorf("lease of %v", left)
	}
	for name, c := range map[string]struct {
		body any
		code problem.Code
	}{
		"another key's token": {wire.InsideRenew{Token: w.token(newKey(t))}, problem.TokenAudience},
		"nonsense":            {"x", problem.BadRequest},
		"too large":           {strings.Repeat("x", wire.MaxInsideBody), problem.TooLarge},
	} {
		if err := j.inside("POST", wire.PathRenew, c.body, nil); problem.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if err := j.inside("GET", "/etc/passwd", nil, nil); problem.CodeOf(err) != problem.NotFound {
		t.Errorf("unknown path: %v", err)
	}
	if err := j.usable(); err != nil {
		t.Errorf("a coordinator that is away ends a running job: %v", err)
	}

	w.coord.start()
	h := w.coord.hello()
	if len(h.Sessions) != 1 || h.Sessions[0].Session != j.offer.Session || !h.Sessions[0].Expires.Equal(lease.Expires) ||
		h.Sessions[0].Key != j.offer.Key || len(h.Sessions[0].Rules) != 1 {
		t.Errorf("hello does not re-assert the session: %+v", h.Sessions)
	}
	r := body[wire.Renewed](t, w.coord.expect(wire.FrameRenewed))
	if r.Session != j.offer.Session || r.Token != fresh || !r.Lease.Expires.Equal(lease.Expires) {
		t.Errorf("the renewal was not passed on: %+v", r)
	}
}

func TestCoordinatorRenewsAndEnds(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	a, err := w.coord.ask(wire.FrameRenew, wire.Renewed{Session: j.offer.Session, Token: w.token(j.offer.Key)})
	if err != nil || a.Lease == nil || time.Until(a.Lease.Expires) < 50*time.Second {
		t.Errorf("renewal: %+v, %v", a, err)
	}
	c, err := j.flow()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.coord.send(frame(wire.FrameEnd, 0, wire.End{Session: j.offer.Session, Reason: "the job is over"}))
	if e := body[wire.End](t, w.coord.expect(wire.FrameEnd)); e.Session != j.offer.Session {
		t.Errorf("end of %q", e.Session)
	}
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("an open flow of an ended session: %v, want a reset", err)
	}
	if h := w.gateway.table.held(); len(h) != 0 {
		t.Errorf("still held: %v", h)
	}
}

func TestWelcomeEndsSessions(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j, kept := w.join(nil), w.join(nil)
	w.coord.script(func(c *coordinator) { c.welcome.End = []string{j.offer.Session, "nobody"} })
	w.coord.drop()
	if h := w.coord.hello(); len(h.Sessions) != 2 {
		t.Errorf("re-asserted %d sessions, want 2", len(h.Sessions))
	}
	eventually(t, "the session ends", func() bool { return w.gateway.table.size() == 1 })
	if err := kept.usable(); err != nil {
		t.Errorf("the other one: %v", err)
	}
}

func TestWelcomeMovesAddressesOnlyWithoutSessions(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	moved := []netip.Addr{netip.MustParseAddr("198.18.128.1"), netip.MustParseAddr("fd63:756c:7665:7274::c612:8001")}
	w.coord.script(func(c *coordinator) { c.welcome.Addresses = moved })
	w.coord.drop()
	w.coord.hello()
	eventually(t, "the stream is up", w.gateway.stream.up)
	if err := j.usable(); err != nil {
		t.Fatalf("a word of the coordinator moved a running session: %v", err)
	}
	w.coord.send(frame(wire.FrameEnd, 0, wire.End{Session: j.offer.Session}))
	eventually(t, "the session ends", func() bool { return w.gateway.table.size() == 0 })
	w.coord.drop()
	w.coord.hello()
	eventually(t, "the stream is up", w.gateway.stream.up)
	next := w.newJob()
	a, err := w.coord.ask(wire.FrameOffer, next.offer)
	if err != nil || a.Gateway.Addresses[0] != moved[0] {
		t.Fatalf("answer %+v, %v", a.Gateway, err)
	}
	next.connect(a.Gateway)
	if err := next.usable(); err != nil {
		t.Error(err)
	}
}

func TestWelcomeWithBadAddressesIsRefused(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	for _, addrs := range [][]netip.Addr{nil, gatewayAddrs[:1], {netip.MustParseAddr("127.0.0.1"), gatewayAddrs[1]}} {
		err := w.gateway.welcome(wire.Welcome{Version: wire.Version, Addresses: addrs})
		if problem.CodeOf(err) != problem.Incompatible {
			t.Errorf("%v: %v", addrs, err)
		}
	}
}

func TestLeaseEndsInTheDataPlane(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(func(o *wire.Offer) { o.Lease = wire.Duration(time.Second) })
	if err := j.usable(); err != nil {
		t.Fatal(err)
	}
	if e := body[wire.End](t, w.coord.expect(wire.FrameEnd)); e.Session != j.offer.Session || e.Reason != "lease ran out" {
		t.Errorf("end %+v", e)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if c, err := j.device.DialContext(ctx, "tcp", w.service.String()); err == nil {
		_ = c.Close()
		t.Error("reached after the lease")
	}
}

func TestRestartWithTheSameStateKeepsTheKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	w := newWorld(t, func(o *Options) { o.StateDir = dir })
	first := w.coord.hello()
	if err := w.gateway.Close(); err != nil {
		t.Fatal(err)
	}
	w.coord.expect(wire.FrameLeaving)
	w.start()
	second := w.coord.hello()
	if first.Key != second.Key {
		t.Error("another key after the restart")
	}
	if first.Instance == second.Instance {
		t.Error("the same instance after the restart")
	}
	j := w.join(nil)
	if err := j.usable(); err != nil {
		t.Error(err)
	}
}

func TestCloseSaysGoodbye(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	c, err := j.flow()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	began := time.Now()
	if err := w.gateway.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("closing took %v", d)
	}
	if f := w.coord.expect(wire.FrameLeaving, wire.FrameEnd); f.Type != wire.FrameLeaving {
		t.Error("sessions ended before the coordinator was told to offer no more")
	}
	if e := body[wire.End](t, w.coord.expect(wire.FrameEnd)); e.Session != j.offer.Session {
		t.Errorf("end of %q", e.Session)
	}
	if code := w.coord.closed(); code != websocket.StatusNormalClosure {
		t.Errorf("the stream was closed with %v", code)
	}
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("an open flow: %v, want a reset", err)
	}
}

func TestMetricsPage(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	if err := j.usable(); err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + w.gateway.MetricsAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	defer http.DefaultClient.CloseIdleConnections()
	_, page := get("/metrics")
	for _, line := range []string{
		"culvert_gateway_sessions 1", "culvert_gateway_stream_up 1", "culvert_gateway_admitted_total 1", "culvert_gateway_flows_allowed_total 1",
	} {
		if !strings.Contains(page, line) {
			t.Errorf("the page lacks %q:\n%s", line, page)
		}
	}
	if strings.Contains(page, j.offer.Session) {
		t.Error("the page names a session")
	}
	w.coord.send(frame(wire.FrameEnd, 0, wire.End{Session: j.offer.Session}))
	w.coord.expect(wire.FrameEnd)
	if _, page := get("/metrics"); !strings.Contains(page, "culvert_gateway_flows_allowed_total 1") {
		t.Error("the flows of a session that is over are forgotten")
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("readyz: %d", code)
	}
	eventually(t, "the stream is up", w.gateway.stream.up)
	w.coord.stop()
	eventually(t, "the stream is gone", func() bool { return !w.gateway.stream.up() })
	if code, _ := get("/readyz"); code != http.StatusServiceUnavailable {
		t.Errorf("readyz without a stream: %d", code)
	}
}

func TestStartFailsCleanly(t *testing.T) {
	taken, err := net.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.LocalAddr().String())
	for name, change := range map[string]func(*Options){
		"port in use":    func(o *Options) { o.Listen = ":" + port },
		"metrics in use": func(o *Options) { o.Metrics = "192.0.2.1:1" },
		"broken policy":  func(o *Options) { o.PolicyFile = writeFile(t, "rules: 7") },
		"no policy file": func(o *Options) { o.PolicyFile = "/nowhere/policy.yaml" },
		"state a file":   func(o *Options) { o.StateDir = writeFile(t, "") },
		"bad issuer":     func(o *Options) { o.Issuers = []claims.Issuer{{URL: "http://issuer.example.com"}} },
	} {
		t.Run(name, func(t *testing.T) {
			o := validOptions(t)
			o.Listen, o.Logger = ":0", slog.New(slog.DiscardHandler)
			change(&o)
			g, err := Start(t.Context(), o)
			if err == nil {
				_ = g.Close()
				t.Fatal("started")
			}
			if problem.From(err).Next == "" {
				t.Errorf("no next step: %v", err)
			}
		})
	}
}
