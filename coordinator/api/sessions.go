package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func (a *API) healthz(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok\n") }

// readyz says whether joins can be served: state and audit log are within reach, and we are not on our way out. Its caller
// is not trusted, so an answer holds for a second.
func (a *API) readyz(w http.ResponseWriter, r *http.Request) {
	if a.leaving.Load() || a.draining.Load() {
		a.fail(w, shuttingDown())
		return
	}
	if err := a.ready.ask(r.Context(), a.findReady); err != nil {
		a.fail(w, err)
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

func (a *API) findReady(ctx context.Context) error {
	if err := a.opts.Store.Ready(ctx); err != nil {
		return problem.Wrap(err, problem.Unreachable, "the coordinator cannot reach its state", "look at its log")
	}
	if err := a.opts.Audit.Ready(); err != nil {
		return problem.Wrap(err, problem.Unreachable, "the coordinator cannot store its audit records", "look at its log")
	}
	return nil
}

// readiness is an answer that holds for a while.
type readiness struct {
	mu  sync.Mutex
	err error
	at  time.Time
}

const (
	readyFor     = time.Second
	readyTimeout = 2 * time.Second
)

// ask gives the last answer, or finds a new one; whoever asks meanwhile waits for that.
func (c *readiness) ask(ctx context.Context, find func(context.Context) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() && time.Since(c.at) < readyFor {
		return c.err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	defer cancel()
	c.err = find(ctx)
	c.at = time.Now()
	return c.err
}

func shuttingDown() error {
	return problem.New(problem.Unreachable, "the coordinator is shutting down", "try again in a few seconds")
}

func (a *API) info(w http.ResponseWriter, r *http.Request) {
	rules := a.rules.Load()
	answer(w, wire.Info{Version: wire.Version, STUN: rules.STUN, Relays: rules.Relays, TicketKey: a.opts.TicketKey})
}

// download is GET /dl/{release}/{file}: a release for runners that cannot reach GitHub.
func (a *API) download(w http.ResponseWriter, r *http.Request) {
	source := limit.Source(middleware.GetClientIPAddr(r.Context()))
	if err := a.releases.Serve(w, r, source, chi.URLParam(r, "release"), chi.URLParam(r, "file")); err != nil {
		a.fail(w, err)
	}
}

// relay is GET /v1/relay: this node's own relay takes over the connection.
func (a *API) relay(w http.ResponseWriter, r *http.Request) {
	if a.draining.Load() {
		a.fail(w, shuttingDown())
		return
	}
	a.opts.Relay.ServeHTTP(w, r)
}

// join is POST /v1/sessions.
func (a *API) join(w http.ResponseWriter, r *http.Request) {
	if a.draining.Load() {
		a.fail(w, shuttingDown())
		return
	}
	j := session.Join{From: middleware.GetClientIPAddr(r.Context())}
	if err := a.read(w, r, &j.JoinRequest); err != nil { // before a place is taken: a body that dawdles must hold none
		a.opts.Audit.Refused(err, j.From)
		a.disbelieved(err, j.From)
		a.fail(w, err)
		return
	}
	select {
	case a.joins <- struct{}{}:
		defer func() { <-a.joins }()
	default:
		a.fail(w, problem.New(problem.RateLimited, "the coordinator has as many joins in progress as it takes", "wait a few seconds and try again"))
		return
	}
	j.Client = printable(clip(j.Client, 128))
	ctx, cancel := context.WithTimeout(r.Context(), a.opts.JoinTimeout)
	defer cancel()
	a.opts.Metrics.waiting.Inc()
	defer a.opts.Metrics.waiting.Dec()
	began := time.Now()
	if wantsEvents(r) {
		a.opts.Metrics.joined(began, a.joinStreamed(ctx, w, j))
		return
	}
	s, err := a.opts.Sessions.Join(ctx, j)
	a.opts.Metrics.joined(began, err)
	if err != nil {
		a.disbelieved(err, j.From)
		a.fail(w, err)
		return
	}
	answer(w, s)
}

// joinStreamed answers a join line by line: the client can start its checks on the first, while a gateway is being asked. A
// join refused before that is an ordinary problem with its own status.
func (a *API) joinStreamed(ctx context.Context, w http.ResponseWriter, j session.Join) error {
	begun := false
	lines := json.NewEncoder(w)
	j.Admitted = func(s wire.Session) error {
		begun = true
		w.Header().Set("Content-Type", wire.MediaEvents)
		w.Header().Set("X-Accel-Buffering", "no") // nginx, or it would hold the first line back
		if err := lines.Encode(wire.JoinEvent{Admitted: &s}); err != nil {
			return err
		}
		return http.NewResponseController(w).Flush()
	}
	s, err := a.opts.Sessions.Join(ctx, j)
	switch {
	case err == nil:
		_ = lines.Encode(wire.JoinEvent{Session: &s}) // a client that has gone lets the lease run out
	case !begun:
		a.disbelieved(err, j.From)
		a.fail(w, err)
	default:
		doc, _ := json.Marshal(problem.From(err)) // strings alone: it always encodes
		_ = lines.Encode(wire.JoinEvent{Problem: doc})
	}
	return err
}

// wantsEvents reports whether the client asks for a stream of events (RFC 9110, section 12.5.1).
func wantsEvents(r *http.Request) bool {
	for _, h := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(h, ",") {
			media, params, err := mime.ParseMediaType(part)
			if err == nil && media == wire.MediaEvents && params["q"] != "0" {
				return true
			}
		}
	}
	return false
}

// update is PATCH /v1/sessions/{id}.
func (a *API) update(w http.ResponseWriter, r *http.Request) {
	secret, err := bearer(r)
	if err != nil {
		a.fail(w, err)
		return
	}
	var u wire.Update
	if err := a.read(w, r, &u); err != nil {
		a.fail(w, err)
		return
	}
	lease, err := a.opts.Sessions.Update(r.Context(), chi.URLParam(r, "id"), secret, u)
	if err != nil {
		a.fail(w, err)
		return
	}
	answer(w, lease)
}

// standby is POST /v1/sessions/{id}/standby.
func (a *API) standby(w http.ResponseWriter, r *http.Request) {
	secret, err := bearer(r)
	if err != nil {
		a.fail(w, err)
		return
	}
	var q wire.StandbyRequest
	if err := a.read(w, r, &q); err != nil {
		a.fail(w, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.opts.JoinTimeout)
	defer cancel()
	s, err := a.opts.Sessions.Standby(ctx, chi.URLParam(r, "id"), secret, q)
	if err != nil {
		a.fail(w, err)
		return
	}
	answer(w, s)
}

// end is DELETE /v1/sessions/{id}.
func (a *API) end(w http.ResponseWriter, r *http.Request) {
	secret, err := bearer(r)
	if err == nil {
		err = a.opts.Sessions.End(r.Context(), chi.URLParam(r, "id"), secret)
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// bearer is the session secret of a request. Without one the answer is the same as for a wrong one.
func bearer(r *http.Request) (wire.Secret, error) {
	scheme, secret := credential(r)
	if !strings.EqualFold(scheme, wire.SchemeBearer) || secret == "" || len(secret) > 128 {
		return "", problem.New(problem.SessionUnknown, "no such session, or not with this secret",
			"join again; a session that was not renewed in time is gone")
	}
	return secret, nil
}

// credential splits the Authorization header (RFC 9110, section 11.4).
func credential(r *http.Request) (scheme string, secret wire.Secret) {
	scheme, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return scheme, wire.Secret(strings.TrimSpace(rest))
}

// read takes a JSON body of at most wire.MaxBody bytes that arrives within BodyTimeout.
func (a *API) read(w http.ResponseWriter, r *http.Request, v any) error {
	const next = "update the client; if it is up to date, report this"
	ctl := http.NewResponseController(w)
	_ = ctl.SetReadDeadline(time.Now().Add(a.opts.BodyTimeout)) // unsupported in a recorder, which is never slow
	defer func() { _ = ctl.SetReadDeadline(time.Time{}) }()
	data, err := readAll(http.MaxBytesReader(w, r.Body, wire.MaxBody), r.ContentLength)
	if _, over := errors.AsType[*http.MaxBytesError](err); over {
		return problem.New(problem.TooLarge, "the request's body is larger than 64 KiB", next)
	}
	if err != nil {
		w.Header().Set("Connection", "close")
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return problem.New(problem.BadRequest, "the request's body did not arrive in time", "check the network, and try again")
		}
		return problem.Wrap(err, problem.BadRequest, "the request's body cannot be read", "check the network, and try again")
	}
	if err := json.Unmarshal(data, v); err != nil {
		return problem.Wrap(err, problem.BadRequest, "the request's body is not the JSON that this path takes", next)
	}
	return nil
}

// readAll is io.ReadAll for a body whose length is known, by its sender's word, which is believed as far as to make room once and not time and again.
func readAll(body io.Reader, length int64) ([]byte, error) {
	b := bytes.NewBuffer(make([]byte, 0, min(max(length, 0), usualBody)+bytes.MinRead))
	_, err := b.ReadFrom(body)
	return b.Bytes(), err
}

// usualBody is above what a join's request takes, in bytes.
const usualBody = 8 << 10

// answer sends a value as JSON.
func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client has gone; nothing is left to tell it
}

// printable drops what could break a log line on a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
}
