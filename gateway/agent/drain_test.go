package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestStandbyIsTakenOver: a session that another gateway carries is held under paths of its own, and renewed by the coordinator's
// word, until the client comes over and says so; from then on it is said to be carried here.
func TestStandbyIsTakenOver(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.newJob()
	j.offer.Standby = true
	a, err := w.coord.ask(wire.FrameOffer, j.offer)
	if err != nil {
		t.Fatal(err)
	}
	w.coord.drop()
	if h := w.coord.hello(); len(h.Sessions) != 1 || !h.Sessions[0].Standby {
		t.Fatalf("hello says %+v", h.Sessions)
	}
	eventually(t, "the stream is up", w.gateway.stream.up)
	before := w.gateway.table.held()[0].Expires
	time.Sleep(time.Millisecond) // so that a renewal shows
	w.coord.send(frame(wire.FrameRenewed, 0, wire.Renewed{Session: j.offer.Session, Token: w.token(j.offer.Key)}))
	eventually(t, "the lease is renewed", func() bool { return w.gateway.table.held()[0].Expires.After(before) })

	j.offer.Session = wire.StandbyID(j.offer.Key, a.Gateway.Key)
	j.connect(a.Gateway)
	var me wire.InsideSession
	if err := j.inside(http.MethodPost, wire.PathTake, nil, &me); err != nil || me.Session != j.offer.Key.SessionID() {
		t.Fatalf("take: %+v, %v", me, err)
	}
	if taken := body[wire.Taken](t, w.coord.expect(wire.FrameTaken)); taken.Session != me.Session {
		t.Errorf("the coordinator heard of %+v", taken)
	}
	if err := j.inside(http.MethodPost, wire.PathTake, nil, &me); err != nil {
		t.Error(err)
	}
	if w.gateway.table.held()[0].Standby {
		t.Error("the next hello would say that it stands by")
	}
	if err := j.usable(); err != nil {
		t.Error(err)
	}
}

// TestStandbyIsOfferedAnew: a standby's second offer replaces the first without a word to the coordinator; what is carried here is
// not to be had that way.
func TestStandbyIsOfferedAnew(t *testing.T) {
	r := newRig(t, "", ownerID)
	o := r.fresh()
	o.Standby = true
	first := r.mustAdmit(o)
	carrier := r.plane.get(o.Session)
	if second := r.mustAdmit(o); second == first || !carrier.isClosed() || r.reasonOf(o.Session) != "" {
		t.Errorf("replaced %v, closed %v, said %q", second != first, carrier.isClosed(), r.reasonOf(o.Session))
	}
	if carrier.way != wire.StandbyID(o.Key, r.door.key) {
		t.Errorf("its paths are called %q", carrier.way)
	}
	plain := r.fresh()
	r.mustAdmit(plain)
	plain.Standby = true
	if _, err := r.admit(plain); problem.CodeOf(err) != problem.KeyInUse {
		t.Errorf("a session that is carried here, offered as a standby: %v", err)
	}
	if r.plane.get(plain.Session).way != "" {
		t.Error("a session that is carried here has no paths of its own")
	}
}

// TestLeaveIsForDraining: a gateway that is not about to stop lets nobody go.
func TestLeaveIsForDraining(t *testing.T) {
	r := newRig(t, "", ownerID)
	s := r.mustAdmit(r.fresh())
	if got := codeOf(r.knock(s.addrs[0], "POST", wire.PathLeave, nil)); got != problem.BadRequest {
		t.Errorf("got %q", got)
	}
}

// draining is a world whose gateway has begun to drain, with a job that was told.
func startDraining(t *testing.T, bound time.Duration, standby bool) (w *world, j *job, told chan struct{}, done chan struct{}, hurry context.CancelFunc) {
	t.Helper()
	w = newWorld(t, func(o *Options) { o.Drain = bound })
	w.coord.hello()
	j = w.newJob()
	a, err := w.coord.ask(wire.FrameOffer, j.offer)
	if err != nil {
		t.Fatal(err)
	}
	told = make(chan struct{}, 1)
	loop := wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), w.gateway.Port())}
	if _, err = j.tunnel.AddPeer(tunnel.PeerOptions{
		Key: a.Gateway.Key, Session: j.offer.Session, Candidates: []wire.Candidate{loop}, Initiate: true,
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, OnLeave: func() { told <- struct{}{} },
	}); err != nil {
		t.Fatal(err)
	}
	j.ping(a.Gateway.Addresses[0])
	if standby {
		other := w.newJob().offer
		other.Standby = true
		if _, err := w.coord.ask(wire.FrameOffer, other); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := j.flow()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	done = make(chan struct{})
	go func() { defer close(done); w.gateway.Drain(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-told:
	case <-time.After(30 * time.Second):
		t.Fatal("the job was not told")
	}
	j.open = conn
	return w, j, told, done, cancel
}

// TestDraining: no new session gets in, a running one is told and keeps its connections, opens new ones, and may go once they are
// over; the gateway waits for nobody else.
func TestDraining(t *testing.T) {
	w, j, _, done, _ := startDraining(t, time.Hour, true)
	w.coord.expect(wire.FrameLeaving)
	if _, err := w.coord.ask(wire.FrameOffer, w.newJob().offer); problem.CodeOf(err) != problem.NoGateway {
		t.Errorf("a new session: %v", err)
	}
	if text := w.page(t, "/healthz"); strings.TrimSpace(text) != "draining" {
		t.Errorf("health says %q", text)
	}
	if text := w.page(t, "/readyz"); !strings.Contains(text, string(problem.NoGateway)) {
		t.Errorf("ready says %q", text)
	}
	if err := j.usable(); err != nil {
		t.Errorf("a new connection while one is open: %v", err)
	}
	left := make(chan wire.Left, 1)
	go func() {
		var l wire.Left
		for !l.Go {
			if err := j.inside(http.MethodPost, wire.PathLeave, nil, &l); err != nil {
				t.Errorf("leave: %v", err)
				break
			}
		}
		left <- l
	}()
	if _, err := io.WriteString(j.open, "pong"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(j.open, make([]byte, 4)); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	select {
	case l := <-left:
		t.Fatalf("let go with a connection open: %+v", l)
	default:
	}
	_ = j.open.Close()
	select {
	case l := <-left:
		if l.Open != 0 {
			t.Errorf("%d connections cut", l.Open)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("never let go")
	}
	w.coord.send(frame(wire.FrameEnd, 0, wire.End{Session: j.offer.Session, Reason: "moved"}))
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("it still waits")
	}
}

// TestDrainingEnds: a connection that does not end is cut when time is up, or when somebody asks a second time.
func TestDrainingEnds(t *testing.T) {
	for name, end := range map[string]func(hurry context.CancelFunc){
		"time is up":  func(context.CancelFunc) {},
		"asked twice": func(hurry context.CancelFunc) { hurry() },
	} {
		t.Run(name, func(t *testing.T) {
			bound := 200 * time.Millisecond
			if name == "asked twice" {
				bound = time.Hour
			}
			_, j, _, done, hurry := startDraining(t, bound, false)
			end(hurry)
			var l wire.Left
			if name == "time is up" {
				if err := j.inside(http.MethodPost, wire.PathLeave, nil, &l); err != nil || !l.Go || l.Open != 1 {
					t.Errorf("leave: %+v, %v", l, err)
				}
			}
			select {
			case <-done:
			case <-time.After(30 * time.Second):
				t.Fatal("it still waits")
			}
		})
	}
}

// TestDrainingWaitsForConnectionsAlone: a session that has none and nowhere to go holds nobody up.
func TestDrainingWaitsForConnectionsAlone(t *testing.T) {
	_, j, _, done, _ := startDraining(t, time.Hour, false)
	select {
	case <-done:
		t.Fatal("it did not wait for the connection")
	case <-time.After(drainSettle + 200*time.Millisecond):
	}
	_ = j.open.Close()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("it still waits")
	}
}

// page reads one of the gateway's pages, whatever its status.
func (w *world) page(t *testing.T, path string) string {
	t.Helper()
	resp, err := http.Get("http://" + w.gateway.MetricsAddr() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
	return string(text)
}

// TestDrainingTellsWhoMightComeOver: a job for which the gateway stands by hears of it, or it would move to a gateway that is about to stop.
func TestDrainingTellsWhoMightComeOver(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Drain = time.Hour })
	w.coord.hello()
	j := w.newJob()
	j.offer.Standby = true
	a, err := w.coord.ask(wire.FrameOffer, j.offer)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan struct{}, 1)
	loop := wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), w.gateway.Port())}
	if _, err = j.tunnel.AddPeer(tunnel.PeerOptions{
		Key: a.Gateway.Key, Session: wire.StandbyID(j.offer.Key, a.Gateway.Key), Candidates: []wire.Candidate{loop}, Initiate: true,
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, OnLeave: func() { told <- struct{}{} },
	}); err != nil {
		t.Fatal(err)
	}
	j.ping(a.Gateway.Addresses[0])
	w.gateway.Drain(t.Context()) // nothing is carried here, so it waits for nobody
	select {
	case <-told:
	case <-time.After(30 * time.Second):
		t.Fatal("the job was not told")
	}
}
