// Package agenttest is the world around a client, for tests: an issuer's token endpoint and a coordinator that follow a
// script, and a gateway made of the real tunnel and network stack, all on loopback.
package agenttest

import (
	"cmp"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// The world's addresses.
var (
	Overlay = netip.MustParseAddr("198.18.0.1") // the gateway's, inside the tunnel
	Service = netip.MustParseAddr("10.77.0.5")  // says "hello" to HTTP on ServicePort
	Granted = netip.MustParsePrefix("10.77.0.0/24")
)

// ServicePort is the only open TCP port of [Service].
const ServicePort = 8080

// Bearer is what the token endpoint wants to see.
const Bearer = "request-token"

// World is an issuer, a coordinator and a gateway. Set what the script changes before the first join.
type World struct {
	HTTP    *httptest.Server // issuer and coordinator
	URL     string           // the coordinator's, as clients know it; default where HTTP listens
	Gateway *Gateway
	Second  *Gateway // nil unless a script calls [World.AddGateway]

	OnJoin func(n int, w http.ResponseWriter) bool // the nth join; true says that it has been answered
	OnInfo func() wire.Info
	// OnStandby says who stands by, to the nth request; nil for nobody. Default: the second gateway.
	OnStandby func(n int, q wire.StandbyRequest) *Gateway
	Session   func(*wire.Session) // changes the session that a join gives
	Held      chan struct{}       // where set, the last line of a join waits until it is closed
	Lease     time.Duration       // default 10 min
	Over      string              // where set, the coordinator says that it has ended every session, for this reason
	Plain     bool                // answer joins with one JSON document instead of a stream
	Apart     bool                // neither side is told where the other is: only relays lead there

	relays   []*Relay
	t        *testing.T
	mu       sync.Mutex
	joins    []wire.JoinRequest
	updates  []wire.Update
	standbys []wire.StandbyRequest
	given    map[string]netip.Addr // to sessions
	ended    []string
	next     byte // last byte of the next session's address
	secrets  map[string]wire.Secret
}

// New starts a world that ends with the test. The scripts are applied before anything can ask; where clients are processes
// of their own, that is the place for them.
func New(t *testing.T, scripts ...func(*World)) *World {
	t.Helper()
	w := &World{t: t, next: 10, secrets: map[string]wire.Secret{}, given: map[string]netip.Addr{}, Lease: 10 * time.Minute, Gateway: newGateway(t)}
	for _, script := range scripts {
		script(w)
	}
	w.Gateway.start(t, w.relays)
	if w.Second != nil {
		w.Second.start(t, w.relays)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /token", w.token)
	mux.HandleFunc("GET "+wire.PathInfo, w.info)
	mux.HandleFunc("POST "+wire.PathSessions, w.join)
	mux.HandleFunc("PATCH "+wire.PathSessions+"/{id}", w.update)
	mux.HandleFunc("POST "+wire.PathSessions+"/{id}"+wire.PathStandby, w.standby)
	mux.HandleFunc("DELETE "+wire.PathSessions+"/{id}", w.end)
	w.HTTP = httptest.NewUnstartedServer(mux)
	w.URL = cmp.Or(w.URL, "http://"+w.HTTP.Listener.Addr().String()) // before anything can ask
	w.HTTP.Start()
	t.Cleanup(w.HTTP.Close)
	return w
}

// Token is the token that the world's issuer gives for an audience, and that its coordinator takes.
func Token(audience string) wire.Secret { return wire.Secret("token for " + audience) }

// Environ is what a job has in its environment to ask for tokens and to find the coordinator.
func (w *World) Environ() []string {
	return []string{
		"ACTIONS_ID_TOKEN_REQUEST_URL=" + w.HTTP.URL + "/token?api-version=2.0",
		"ACTIONS_ID_TOKEN_REQUEST_TOKEN=" + Bearer,
		"CULVERT_COORDINATOR=" + w.URL,
	}
}

// Joins are the requests for sessions so far.
func (w *World) Joins() []wire.JoinRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.joins)
}

// End has the coordinator say, from now on, that it has ended every session, and the gateway know none of them.
func (w *World) End(reason string) {
	w.mu.Lock()
	w.Over = reason
	w.mu.Unlock()
	w.Gateway.Forget()
}

// Updates are the bodies of PATCH so far.
func (w *World) Updates() []wire.Update {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.updates)
}

// Ended are the sessions that clients have ended.
func (w *World) Ended() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.ended)
}

func (w *World) token(rw http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer "+Bearer {
		http.Error(rw, "no", http.StatusUnauthorized)
		return
	}
	reply(rw, map[string]string{"value": Token(r.URL.Query().Get("audience")).Reveal()})
}

func (w *World) info(rw http.ResponseWriter, _ *http.Request) {
	info := wire.Info{Version: wire.Version}
	for _, r := range w.relays {
		info.Relays = append(info.Relays, r.seen())
	}
	if w.OnInfo != nil {
		info = w.OnInfo()
	}
	reply(rw, info)
}

func (w *World) join(rw http.ResponseWriter, r *http.Request) {
	var j wire.JoinRequest
	if err := json.NewDecoder(r.Body).Decode(&j); err != nil {
		problem.Write(rw, problem.New(problem.BadRequest, "not json", ""))
		return
	}
	w.mu.Lock()
	w.joins = append(w.joins, j)
	n := len(w.joins)
	w.mu.Unlock()
	if j.Token != Token(wire.Audience(w.URL, j.Key)) {
		problem.Write(rw, problem.New(problem.TokenAudience, "the token is for something else", ""))
		return
	}
	if w.OnJoin != nil && w.OnJoin(n, rw) {
		return
	}
	s := w.newSession(j)
	if w.Plain {
		w.admit(j, s)
		reply(rw, s)
		return
	}
	rw.Header().Set("Content-Type", wire.MediaEvents)
	reply(rw, wire.JoinEvent{Admitted: &s})
	_ = http.NewResponseController(rw).Flush()
	w.admit(j, s)
	if w.Held != nil {
		<-w.Held
	}
	reply(rw, wire.JoinEvent{Session: &s})
}

func (w *World) admit(j wire.JoinRequest, s wire.Session) {
	if w.Apart {
		j.Candidates = nil
	}
	var grants []tunnel.Grant
	for _, r := range w.relays {
		g := r.grant(s.ID, relay.Gateway, w.Gateway.Key())
		grants = append(grants, tunnel.Grant{Relay: r.known(), Ticket: g.Ticket, Expires: g.Expires})
	}
	w.Gateway.admit(w.t, j, s, grants)
}

func (w *World) newSession(j wire.JoinRequest) wire.Session {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := j.Key.SessionID()
	secret := wire.Secret("secret of " + id)
	w.secrets[id] = secret
	s := wire.Session{
		ID:        id,
		Network:   "corp",
		Secret:    secret,
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{198, 18, 0, w.next})},
		Gateways:  []wire.Gateway{w.Gateway.describe()},
		Rules:     []string{"deploy"},
		Lease:     wire.Duration(w.Lease),
		Expires:   time.Now().Add(w.Lease),
		Ends:      time.Now().Add(24 * time.Hour),
		Standby:   w.Second != nil,
	}
	w.given[id] = s.Addresses[0]
	for _, r := range w.relays {
		s.Relays = append(s.Relays, r.grant(id, relay.Client, j.Key))
	}
	if w.Apart {
		s.Gateways[0].Candidates = nil
	}
	w.next++
	if w.Session != nil {
		w.Session(&s)
	}
	return s
}

// authorized holds a request against the session's secret.
func (w *World) authorized(rw http.ResponseWriter, r *http.Request) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	secret, ok := w.secrets[r.PathValue("id")]
	if ok && r.Header.Get("Authorization") == "Bearer "+secret.Reveal() {
		return true
	}
	problem.Write(rw, problem.New(problem.SessionUnknown, "no such session", ""))
	return false
}

func (w *World) update(rw http.ResponseWriter, r *http.Request) {
	var u wire.Update
	if !w.authorized(rw, r) || json.NewDecoder(r.Body).Decode(&u) != nil {
		return
	}
	w.mu.Lock()
	w.updates = append(w.updates, u)
	over := w.Over
	w.mu.Unlock()
	if over != "" {
		problem.Write(rw, problem.New(problem.SessionOver, "the session has ended: "+over, "join again"))
		return
	}
	reply(rw, wire.Lease{Expires: time.Now().Add(w.Lease), Ends: time.Now().Add(24 * time.Hour)})
}

func (w *World) end(rw http.ResponseWriter, r *http.Request) {
	if !w.authorized(rw, r) {
		return
	}
	w.mu.Lock()
	w.ended = append(w.ended, r.PathValue("id"))
	w.mu.Unlock()
	rw.WriteHeader(http.StatusNoContent)
}

func reply(rw http.ResponseWriter, v any) { _ = json.NewEncoder(rw).Encode(v) }
