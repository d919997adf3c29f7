package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Server answers on a tunnel's control socket. Having it is also the lock that makes a name unique for its user.
type Server struct {
	listener net.Listener
	http     *http.Server
	log      *slog.Logger
	done     chan struct{} // closed when serving has ended; nil before Serve
	once     sync.Once
}

// Listen takes the control socket of this name. Code already-up where a tunnel of this name runs.
func Listen(name string, log *slog.Logger) (*Server, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	listener, err := listen(name)
	switch {
	case err != nil && !errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("open the control socket: %w", err)
	case err != nil:
		return nil, problem.Wrap(err, problem.AlreadyUp, fmt.Sprintf("a tunnel named %q runs already", name),
			"end it with `culvert down`, or choose another --name")
	}
	return &Server{listener: &guard{Listener: listener, users: Users(), log: log}, log: log}, nil
}

// Serve answers with h until Close. It returns at once.
func (s *Server) Serve(h Handler) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, h.Status())
	})
	mux.HandleFunc("GET "+pathClaim, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, h.Claim())
	})
	mux.HandleFunc("POST "+pathCheck, func(w http.ResponseWriter, r *http.Request) {
		check(w, r, h)
	})
	mux.HandleFunc("POST "+pathDown, func(w http.ResponseWriter, r *http.Request) {
		s.Release() // so that a new tunnel may take the name as soon as the caller knows
		if err := h.Down(r.Context()); err != nil {
			problem.Write(w, err)
			return
		}
		reply(w, struct{}{})
	})
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.done = make(chan struct{})
	go func() {
		defer close(s.done)
		_ = s.http.Serve(s.listener) // ends with ErrServerClosed, or because Release closed the socket
	}()
}

// Release gives the name back; requests in progress go on.
func (s *Server) Release() { s.once.Do(func() { _ = s.listener.Close() }) }

// Close gives the name back, lets requests in progress finish for up to a second, and waits.
func (s *Server) Close() error {
	s.Release()
	if s.http == nil {
		return nil
	}
	deadline := time.AfterFunc(time.Second, func() { _ = s.http.Close() })
	defer deadline.Stop()
	err := shutdown(s.http)
	<-s.done
	return err
}

func check(w http.ResponseWriter, r *http.Request, h Handler) {
	var req wire.ReachRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, wire.MaxBody)).Decode(&req); err != nil {
		problem.Write(w, problem.Wrap(err, problem.BadRequest, "the request is not JSON of the form {\"target\": \"host:port\"}", ""))
		return
	}
	result, err := h.Check(r.Context(), req.Target)
	if err != nil {
		problem.Write(w, err)
		return
	}
	reply(w, result)
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the caller went away; nothing is left to tell it
}

// guard hands out connections of its users alone.
type guard struct {
	net.Listener
	users []int
	log   *slog.Logger
}

// Accept waits for the next connection whose other end the kernel says is one of the users.
func (g *guard) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn)
		if err == nil && slices.Contains(g.users, uid) {
			return conn, nil
		}
		if err != nil {
			g.log.Warn("refused a control connection whose user is not known", "err", err)
		} else {
			g.log.Warn("refused a control connection", "uid", uid)
		}
		_ = conn.Close()
	}
}
