package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// How long the services inside the tunnel wait for a session.
const (
	insideRead  = 10 * time.Second // a whole request
	insideWrite = 30 * time.Second // longer than a dial may take
	insideIdle  = 2 * time.Minute
)

// What one session may ask of the services inside the tunnel, and have logged of what it does wrong: lines a second, and at once.
const (
	questionRate, questionBurst = 50, 200
	lineRate, lineBurst         = 0.2, 20
)

var errQuestions = problem.New(problem.RateLimited, "the session asks the gateway too much", "try again in a second")

// insideHandler answers a session's questions about itself. Who asks is known by the source address, which WireGuard has
// authenticated.
func (d *door) insideHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathInsideMe, d.inside(d.serveMe))
	mux.HandleFunc("POST "+wire.PathRenew, d.inside(d.serveRenew))
	mux.HandleFunc("POST "+wire.PathReach, d.inside(d.serveReach))
	mux.HandleFunc("POST "+wire.PathTake, d.inside(d.serveTake))
	mux.HandleFunc("POST "+wire.PathLeave, d.inside(d.serveLeave))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, problem.New(problem.NotFound, "the gateway serves nothing at "+r.Method+" "+r.URL.Path,
			"check that client and gateway are of the same version"))
	})
	return mux
}

// inside finds the session that asks and encodes what serve answers.
func (d *door) inside(serve func(*http.Request, *session) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, wire.MaxInsideBody)
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		s, ok := d.table.from(from.Addr())
		if err != nil || !ok {
			problem.Write(w, errOver)
			return
		}
		if !s.questions.Allow() {
			w.Header().Set("Connection", "close") // new connections are bounded below
			problem.Write(w, errQuestions)
			return
		}
		v, err := serve(r, s)
		if err != nil {
			if s.said.Allow() {
				d.log.Warn("request inside the tunnel failed", "session", s.id, "code", problem.CodeOf(err), "err", err)
			}
			problem.Write(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_ = json.NewEncoder(w).Encode(v) // the session went away; nothing is left to tell it
	}
}

func (d *door) serveMe(_ *http.Request, s *session) (any, error) {
	lease := d.table.leaseOf(s)
	routes, named := d.reach(s)
	reached, more := s.carrier.Reached()
	return wire.InsideSession{
		Session: s.id, Gateway: d.name, Addresses: s.addrs, Routes: routes, Names: named, Grants: s.grants,
		Expires: lease.Expires, Ends: lease.Ends, Flows: s.carrier.Counts(),
		Reached: reached, More: more,
	}, nil
}

func (d *door) serveRenew(r *http.Request, s *session) (any, error) {
	var req wire.InsideRenew
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), insideRead)
	defer cancel()
	lease, err := d.renew(ctx, s, req.Token)
	if err != nil {
		return nil, err
	}
	d.renewed(wire.Renewed{Session: s.id, Token: req.Token, Lease: &lease})
	return lease, nil
}

func (d *door) serveReach(r *http.Request, s *session) (any, error) {
	var req wire.ReachRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	target, err := parseTarget(req.Target)
	if err != nil {
		return nil, err
	}
	busy := problem.New(problem.RateLimited, "the session tries too many targets at once", "try again in a second")
	if !s.reaches.Allow() {
		return nil, busy
	}
	select {
	case s.tries <- struct{}{}:
		defer func() { <-s.tries }()
	default:
		return nil, busy
	}
	res := s.carrier.Reach(target)
	res.Target = req.Target
	return res, nil
}

// decode reads one bounded JSON document.
func decode(body io.Reader, v any) error {
	dec := json.NewDecoder(body)
	if err := dec.Decode(v); err != nil {
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			return problem.New(problem.TooLarge, "the request is too large", "send one token, or one target")
		}
		return problem.New(problem.BadRequest, "the request is no JSON document that the gateway knows",
			"check that client and gateway are of the same version")
	}
	if dec.More() {
		return problem.New(problem.BadRequest, "the request holds more than one JSON document", "send one")
	}
	return nil
}
