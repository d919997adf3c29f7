package agent

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/wire"
)

// until waits for something that other goroutines bring about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to be that %s", what)
		}
	}
}

// pair is a client that is up, with a standby.
func pair(t *testing.T, script func(*agenttest.World), edit func(*Options)) (*agenttest.World, *running) {
	t.Helper()
	w := agenttest.New(t, func(w *agenttest.World) {
		w.AddGateway()
		if script != nil {
			script(w)
		}
	})
	opts := options(t, w)
	if edit != nil {
		edit(&opts)
	}
	a := start(t, opts)
	a.up(t)
	until(t, "the second gateway stands by", func() bool { return a.Status().Standby == "gw-2" })
	return w, a
}

// flow is a connection through the tunnel to the service, which has been answered.
func (r *running) flow(t *testing.T) net.Conn {
	t.Helper()
	c, err := r.dialInside(t.Context(), "tcp", netip.AddrPortFrom(agenttest.Service, agenttest.ServicePort).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// ended waits for a connection's end.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("the open connection: %v", err)
	}
}

func isTimeout(err error) bool {
	n, ok := err.(net.Error)
	return ok && n.Timeout()
}

// TestMovesToTheStandby: the gateway dies; the session goes on at the other one with its key, its address and its lease, what was open
// is reset, and the new gateway is told.
func TestMovesToTheStandby(t *testing.T) {
	for name, script := range map[string]func(*agenttest.World){
		"directly":        nil,
		"through a relay": func(w *agenttest.World) { w.AddRelay("near", true); w.Apart = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, a := pair(t, script, nil)
			before := a.Status()
			open := a.flow(t)
			w.Gateway.Forget()
			began := time.Now()
			if got := a.hello(t); got != "hello" {
				t.Fatalf("got %q", got)
			}
			t.Logf("a new flow after %v", time.Since(began).Round(time.Millisecond))
			ended(t, open)
			until(t, "the new gateway knows", func() bool { return w.Second.Taken() > 0 })
			after := a.Status()
			if after.Session != before.Session || after.Gateway != "gw-2" || after.Rejoins != 0 || after.State != control.Up ||
				!slices.Equal(after.Addresses, before.Addresses) || len(w.Joins()) != 1 {
				t.Errorf("before %+v, after %+v", before, after)
			}
			if _, err := a.Check(t.Context(), netip.AddrPortFrom(agenttest.Service, agenttest.ServicePort).String()); err != nil || len(w.Second.Asked()) != 1 {
				t.Errorf("check: %v", err)
			}
		})
	}
}

// TestLeavesADrainingGateway: connections are kept until the gateway says that none would be cut, and none is when it does.
func TestLeavesADrainingGateway(t *testing.T) {
	t.Parallel()
	w, a := pair(t, nil, nil)
	quiet := make(chan struct{})
	open := a.flow(t)
	w.Gateway.Drain(quiet, 0)
	time.Sleep(300 * time.Millisecond) // a few rounds of asking
	if gw := a.Status().Gateway; gw != "gw" {
		t.Fatalf("moved to %s with a connection open", gw)
	}
	if _, err := io.WriteString(open, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if said, err := io.ReadAll(open); err != nil || len(said) == 0 {
		t.Errorf("the open connection: %q, %v", said, err)
	}
	close(quiet)
	until(t, "the session has moved", func() bool { return a.Status().Gateway == "gw-2" })
	if got := a.hello(t); got != "hello" {
		t.Errorf("got %q", got)
	}
}

// TestDrainingCutsWhatDoesNotEnd: told that its time is up, the session moves all the same and the connection is reset.
func TestDrainingCutsWhatDoesNotEnd(t *testing.T) {
	t.Parallel()
	w, a := pair(t, nil, nil)
	open := a.flow(t)
	quiet := make(chan struct{})
	close(quiet)
	w.Gateway.Drain(quiet, 1)
	ended(t, open)
	if got := a.hello(t); got != "hello" || a.Status().Gateway != "gw-2" {
		t.Errorf("got %q from %s", got, a.Status().Gateway)
	}
}

// TestStandbyMustBePinned: a coordinator that names another gateway than the pinned ones, or the first one again, gains nothing: the session
// does not rely on it, and joins again when the pinned gateway dies.
func TestStandbyMustBePinned(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, func(w *agenttest.World) {
		second := w.AddGateway()
		w.OnStandby = func(int, wire.StandbyRequest) *agenttest.Gateway { return second }
	})
	opts := options(t, w)
	opts.Pins = []wire.Key{w.Gateway.Key()}
	refused := make(chan struct{}, 1)
	opts.Logger = slog.New(watching{opts.Logger.Handler(), func(r slog.Record) {
		if r.Message == "no standby gateway" {
			select {
			case refused <- struct{}{}:
			default:
			}
		}
	}})
	a := start(t, opts)
	a.up(t)
	select {
	case <-refused:
	case <-time.After(40 * time.Second):
		t.Fatal("not refused")
	}
	if only := w.Standbys()[0].Only; !slices.Equal(only, opts.Pins) {
		t.Errorf("asked for one of %v", only)
	}
	if got := a.hello(t); got != "hello" || a.Status().Standby != "" {
		t.Errorf("got %q, standby %q", got, a.Status().Standby)
	}
	w.Gateway.Forget()
	until(t, "it has joined again", func() bool { return len(w.Joins()) > 1 && a.Status().State == control.Up })
	if gw := a.Status().Gateway; gw != "gw" {
		t.Errorf("carried by %s", gw)
	}
}

// watching shows each record to a function.
type watching struct {
	slog.Handler
	see func(slog.Record)
}

func (h watching) Handle(ctx context.Context, r slog.Record) error {
	h.see(r)
	return h.Handler.Handle(ctx, r)
}

func (h watching) WithAttrs(a []slog.Attr) slog.Handler {
	return watching{h.Handler.WithAttrs(a), h.see}
}

// TestStandbyThatIsStopping: the session stays where it is, and another standby is found when there is one.
func TestStandbyThatIsStopping(t *testing.T) {
	t.Parallel()
	w, a := pair(t, nil, nil)
	quiet := make(chan struct{})
	w.Second.Drain(quiet, 0)
	until(t, "another is asked for", func() bool { return len(w.Standbys()) > 1 })
	if q := w.Standbys()[1]; !slices.Contains(q.Not, w.Second.Key()) {
		t.Errorf("asked with %+v", q.Not)
	}
	if st := a.Status(); st.Gateway != "gw" || st.Standby != "" {
		t.Errorf("carried by %s, standby %q", st.Gateway, st.Standby)
	}
	if got := a.hello(t); got != "hello" {
		t.Errorf("got %q", got)
	}
}

// TestOneGatewayAsksForNone: where the coordinator has no other gateway, it is not asked for one.
func TestOneGatewayAsksForNone(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t)
	a := start(t, options(t, w))
	a.up(t)
	a.hello(t)
	if n := len(w.Standbys()); n != 0 {
		t.Errorf("asked %d times", n)
	}
	w.Gateway.Forget()
	until(t, "it has joined again", func() bool { return len(w.Joins()) > 1 && a.Status().State == control.Up })
}

// TestRenewalsGoToTheGatewayInUse: after a move, through the new tunnel.
func TestRenewalsGoToTheGatewayInUse(t *testing.T) {
	t.Parallel()
	w, a := pair(t, func(w *agenttest.World) { w.Lease = 8 * time.Second }, nil)
	w.Gateway.Forget()
	if got := a.hello(t); got != "hello" {
		t.Fatalf("got %q", got)
	}
	until(t, "the new gateway has renewed", func() bool { return len(w.Second.Renewals()) > 0 })
	if st := a.Status(); st.Rejoins != 0 {
		t.Errorf("%d rejoins", st.Rejoins)
	}
}

// TestAnswerOfAGatewayThatWasLeft: what was asked of a gateway before the session moved says nothing about the one that carries it now.
func TestAnswerOfAGatewayThatWasLeft(t *testing.T) {
	t.Parallel()
	_, a := pair(t, nil, nil)
	open := a.flow(t)
	s := a.current()
	for range 3 { // there is room for one, so the first has been dealt with by then
		select {
		case s.companion.going <- going{from: &way{}, cut: true}:
		case <-time.After(40 * time.Second):
			t.Fatal("nobody listens")
		}
	}
	if st := a.Status(); st.Gateway != "gw" || st.Standby != "gw-2" {
		t.Errorf("carried by %s, standby %q", st.Gateway, st.Standby)
	}
	if _, err := io.WriteString(open, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if said, err := io.ReadAll(open); err != nil || len(said) == 0 {
		t.Errorf("the open connection: %q, %v", said, err)
	}
}
