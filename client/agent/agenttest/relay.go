package agenttest

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// Relay is a real relay, on loopback.
type Relay struct {
	Listed wire.Relay
	Seen   string // the URL that clients are given instead; "" for the same

	t    *testing.T
	key  ed25519.PrivateKey
	addr netip.AddrPort // UDP; invalid without
	http *httptest.Server

	mu     sync.Mutex
	server *relay.Server // nil while stopped
}

// AddRelay starts a relay and has the coordinator list it and give tickets for it. It is for scripts.
func (w *World) AddRelay(name string, udp bool) *Relay {
	w.t.Helper()
	r := &Relay{t: w.t}
	var err error
	if _, r.key, err = ed25519.GenerateKey(nil); err != nil {
		w.t.Fatal(err)
	}
	r.http = httptest.NewServer(http.HandlerFunc(r.serve))
	r.Listed = wire.Relay{Name: name, URL: r.http.URL + wire.PathRelay}
	if udp {
		r.addr = netip.MustParseAddrPort("127.0.0.1:0")
	}
	r.Start()
	w.t.Cleanup(func() { r.Stop(); r.http.Close() })
	w.relays = append(w.relays, r)
	return r
}

// Start starts the relay, where it was before.
func (r *Relay) Start() {
	r.t.Helper()
	o := relay.Options{Keys: []ed25519.PublicKey{r.key.Public().(ed25519.PublicKey)}, Logger: slog.New(slog.DiscardHandler)}
	if r.addr.IsValid() {
		o.UDP = r.addr.String()
	}
	s, err := relay.New(context.Background(), o)
	if err != nil {
		r.t.Errorf("start a relay: %v", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.server = s
	if r.addr.IsValid() && r.addr.Port() == 0 { // the first time, before anybody has been told
		r.addr = s.Addr()
		r.Listed.UDP = r.addr.String()
	}
}

// Stop stops it as a crash does: whoever is bound is forgotten.
func (r *Relay) Stop() {
	r.mu.Lock()
	s := r.server
	r.server = nil
	r.mu.Unlock()
	if s != nil {
		_ = s.Close()
	}
}

// Stats gives the running relay's counters.
func (r *Relay) Stats() relay.Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server == nil {
		return relay.Stats{}
	}
	return r.server.Stats()
}

func (r *Relay) serve(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	s := r.server
	r.mu.Unlock()
	if s == nil {
		http.Error(w, "stopped", http.StatusServiceUnavailable)
		return
	}
	s.ServeHTTP(w, req)
}

// grant makes a ticket for one side of a session.
func (r *Relay) grant(session string, side relay.Side, key wire.Key) wire.RelayGrant {
	now := time.Now()
	ticket, err := relay.Sign(r.key, relay.Claims{Session: session, Side: side, Key: key, Issued: now, Expires: now.Add(time.Hour)})
	if err != nil {
		r.t.Errorf("sign a ticket: %v", err)
	}
	return wire.RelayGrant{Relay: r.seen(), Ticket: ticket, Expires: now.Add(time.Hour)}
}

// known is the relay as the gateway's tunnel takes it.
func (r *Relay) known() tunnel.Relay {
	out := tunnel.Relay{Name: r.Listed.Name, URL: r.Listed.URL}
	if r.addr.IsValid() {
		out.UDP = []netip.AddrPort{r.addr}
	}
	return out
}

// seen is the relay as clients are told of it.
func (r *Relay) seen() wire.Relay {
	out := r.Listed
	out.URL = cmp.Or(r.Seen, out.URL)
	return out
}
