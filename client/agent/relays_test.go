package agent

import (
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/wire"
)

// eventually waits for what real parts bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to be that %s", what)
		}
	}
}

// TestJoinsOverARelay: where no address of the other side is of use, the tunnel comes up over a relay, by UDP or by WebSocket,
// and the coordinator is told that the relay answers.
func TestJoinsOverARelay(t *testing.T) {
	for name, udp := range map[string]bool{"udp": true, "websocket": false} {
		t.Run(name, func(t *testing.T) {
			var relay *agenttest.Relay
			w := agenttest.New(t, func(w *agenttest.World) {
				relay = w.AddRelay("near", udp)
				w.Apart = true
			})
			r := start(t, options(t, w))
			ready := r.up(t)
			if ready.Path.Kind != string(wire.Relayed) || ready.Path.Relay != "near" || ready.Path.Transport != name {
				t.Errorf("the path is %+v", ready.Path)
			}
			if got := r.hello(t); got != "hello" {
				t.Errorf("the service said %q", got)
			}
			if st := relay.Stats(); st.Sessions == 0 {
				t.Errorf("the relay carries %+v", st)
			}
		})
	}
}

// TestDirectBeatsRelay: with both, traffic ends up on the direct path.
func TestDirectBeatsRelay(t *testing.T) {
	w := agenttest.New(t, func(w *agenttest.World) { w.AddRelay("near", true) })
	r := start(t, options(t, w))
	r.up(t)
	eventually(t, "the path is direct", func() bool {
		st := r.Status()
		return st.Path != nil && st.Path.Kind == string(wire.Host)
	})
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
}

// TestNamesRelaysNearestFirst: the join names the relays that have answered. The token comes late enough for that.
func TestNamesRelaysNearestFirst(t *testing.T) {
	w := agenttest.New(t, func(w *agenttest.World) {
		w.AddRelay("a", true)
		w.AddRelay("b", true).Stop()
		w.AddRelay("c", true)
	})
	opts := options(t, w)
	var r atomic.Pointer[running]
	opts.Tokens = slowTokens(func() bool { a := r.Load(); return a != nil && a.tunnelKnows("a", "c") })
	r.Store(start(t, opts))
	r.Load().up(t)
	named := slices.Clone(w.Joins()[0].Relays)
	slices.Sort(named)
	if !slices.Equal(named, []string{"a", "c"}) {
		t.Errorf("the join names %q", w.Joins()[0].Relays)
	}
}

// TestAnotherRelayTakesOver: the session survives the end of the relay that carries it.
func TestAnotherRelayTakesOver(t *testing.T) {
	var relays []*agenttest.Relay
	w := agenttest.New(t, func(w *agenttest.World) {
		relays = []*agenttest.Relay{w.AddRelay("a", true), w.AddRelay("b", true)}
		w.Apart = true
	})
	r := start(t, options(t, w))
	ready := r.up(t)
	for _, relay := range relays {
		if relay.Listed.Name == ready.Path.Relay {
			relay.Stop()
		}
	}
	eventually(t, "the other relay carries it", func() bool {
		st := r.Status()
		return st.Path != nil && st.Path.Relay != ready.Path.Relay && st.Path.Relay != ""
	})
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
	if st := r.Status(); st.Rejoins != 0 || st.Session != ready.Session {
		t.Errorf("it took a new session: %+v", st)
	}
}

// TestRelayThatIsStartedAnew: the only relay dies and comes back, and the session goes on where it stopped.
func TestRelayThatIsStartedAnew(t *testing.T) {
	for name, udp := range map[string]bool{"udp": true, "websocket": false} {
		t.Run(name, func(t *testing.T) {
			var relay *agenttest.Relay
			w := agenttest.New(t, func(w *agenttest.World) {
				relay = w.AddRelay("near", udp)
				w.Apart = true
			})
			r := start(t, options(t, w))
			ready := r.up(t)
			relay.Stop()
			eventually(t, "there is no path", func() bool { return r.Status().Path == nil })
			relay.Start()
			eventually(t, "the path is back", func() bool { return r.Status().Path != nil })
			if got := r.hello(t); got != "hello" {
				t.Errorf("the service said %q", got)
			}
			if st := r.Status(); st.Rejoins != 0 || st.Session != ready.Session {
				t.Errorf("it took a new session: %+v", st)
			}
		})
	}
}

// TestGatewayLostBehindARelay: a relay that stands tells that it is the gateway that has gone, and a new session is had soon.
func TestGatewayLostBehindARelay(t *testing.T) {
	w := agenttest.New(t, func(w *agenttest.World) {
		w.AddRelay("near", true)
		w.Apart = true
	})
	r := start(t, options(t, w))
	ready := r.up(t)
	w.Gateway.Forget()
	lost := time.Now()
	eventually(t, "it has joined again", func() bool {
		st := r.Status()
		return st.Rejoins == 1 && st.Path != nil && st.Session != ready.Session
	})
	t.Logf("after %s", time.Since(lost))
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
}

// TestRelayOverAProxy: with a proxy as the only way out, the relay's WebSocket goes through it.
func TestRelayOverAProxy(t *testing.T) {
	var at string
	w, p := behindProxy(t, func(w *agenttest.World) {
		relay := w.AddRelay("near", false)
		w.Apart = true
		at = strings.TrimPrefix(strings.TrimSuffix(relay.Listed.URL, wire.PathRelay), "http://")
		relay.Seen = "http://relay.test" + wire.PathRelay
	})
	p.Hosts["relay.test:80"] = at
	r := start(t, proxied(t, w))
	if ready := r.up(t); ready.Path.Transport != "websocket" {
		t.Errorf("the path is %+v", ready.Path)
	}
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
	if asked := p.Asked(); !slices.Contains(asked, "relay.test:80") {
		t.Errorf("the proxy was asked for %q", asked)
	}
}

// TestHostileRelays: whatever a coordinator lists, nothing is dialled without encryption, and a session comes up all the same.
func TestHostileRelays(t *testing.T) {
	evil := []wire.Relay{
		{Name: "plain", URL: "http://192.0.2.1/v1/relay"}, {Name: "file", URL: "file:///etc/passwd"}, {Name: "user", URL: "https://u:p@x/"},
		{Name: "\n::error::", UDP: "127.0.0.1:1"}, {Name: strings.Repeat("x", 100), UDP: "127.0.0.1:1"}, {Name: ""},
		{Name: "metadata", UDP: "169.254.169.254:80"}, {Name: "group", UDP: "224.0.0.1:5"}, {Name: "none", UDP: "x"}, {Name: "twice"}, {Name: "twice"},
	}
	w := agenttest.New(t, func(w *agenttest.World) {
		w.OnInfo = func() wire.Info { return wire.Info{Version: wire.Version, Relays: slices.Repeat(evil, 100)} }
		w.Session = func(s *wire.Session) {
			for _, r := range evil {
				s.Relays = append(s.Relays, wire.RelayGrant{Relay: r, Ticket: "not a ticket"})
			}
		}
	})
	r := start(t, options(t, w))
	r.up(t)
	for _, known := range r.tunnel.Relays() {
		if known.URL != "" && known.Name != wire.OwnRelay || len(known.UDP) > 0 && known.UDP[0].Addr() != netip.MustParseAddr("127.0.0.1") {
			t.Errorf("the tunnel knows %+v", known)
		}
	}
}

func TestTooManyTickets(t *testing.T) {
	w := agenttest.New(t, func(w *agenttest.World) {
		w.Session = func(s *wire.Session) { s.Relays = make([]wire.RelayGrant, wire.MaxRelays+1) }
	})
	if err := start(t, options(t, w)).failure(t); !strings.Contains(err.Message, "too many relays") {
		t.Errorf("got %v", err)
	}
}
