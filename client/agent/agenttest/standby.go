package agenttest

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// AddGateway starts a second gateway, which the coordinator gives to whoever asks for a standby. It is for scripts.
func (w *World) AddGateway() *Gateway {
	w.t.Helper()
	w.Second = newGateway(w.t)
	w.Second.name = "gw-2"
	return w.Second
}

// Standbys are the requests for a standby so far.
func (w *World) Standbys() []wire.StandbyRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.standbys)
}

func (w *World) standby(rw http.ResponseWriter, r *http.Request) {
	var q wire.StandbyRequest
	if !w.authorized(rw, r) || json.NewDecoder(r.Body).Decode(&q) != nil {
		return
	}
	w.mu.Lock()
	w.standbys = append(w.standbys, q)
	i := slices.IndexFunc(w.joins, func(j wire.JoinRequest) bool { return j.Key.SessionID() == r.PathValue("id") })
	join, addr, given := w.joins[i], w.given[r.PathValue("id")], w.OnStandby
	w.mu.Unlock()
	g := w.Second
	if g != nil && (g.Taken() > 0 || slices.Contains(q.Not, g.Key()) || len(q.Only) > 0 && !slices.Contains(q.Only, g.Key())) {
		g = nil
	}
	if given != nil {
		g = given(len(w.Standbys()), q)
	}
	if g == nil {
		problem.Write(rw, problem.New(problem.NoGateway, "no other gateway", ""))
		return
	}
	way := wire.StandbyID(join.Key, g.Key())
	join.Candidates = q.Candidates
	out := wire.Standby{Gateway: g.describe()}
	var grants []tunnel.Grant
	for _, one := range w.relays {
		mine := one.grant(way, relay.Gateway, g.Key())
		grants = append(grants, tunnel.Grant{Relay: one.known(), Ticket: mine.Ticket, Expires: mine.Expires})
		out.Relays = append(out.Relays, one.grant(way, relay.Client, join.Key))
	}
	if w.Apart {
		join.Candidates, out.Gateway.Candidates = nil, nil
	}
	g.admit(w.t, join, wire.Session{ID: way, Addresses: []netip.Addr{addr}}, grants)
	reply(rw, out)
}

// Taken counts how often clients said that they have come over.
func (g *Gateway) Taken() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.taken
}

func (g *Gateway) take(w http.ResponseWriter, _ *http.Request) {
	g.mu.Lock()
	g.taken++
	g.mu.Unlock()
	reply(w, wire.InsideSession{})
}

// Drain tells every client that the gateway is about to stop. It lets them go when quiet says so; open is how many connections are
// cut then.
func (g *Gateway) Drain(quiet <-chan struct{}, open uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.quiet, g.cut = quiet, open
	for _, p := range g.peers {
		p.Leave()
	}
}

func (g *Gateway) leave(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	quiet, open := g.quiet, g.cut
	g.mu.Unlock()
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-quiet:
		reply(w, wire.Left{Go: true, Open: open})
	case <-timer.C:
		reply(w, wire.Left{Open: 1})
	case <-r.Context().Done():
	}
}
