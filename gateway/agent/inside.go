package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
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

// stackListener is what the services ask of the network stack.
type stackListener interface {
	ListenTCP(netip.AddrPort) (net.Listener, error)
	ListenUDP(netip.AddrPort) (net.PacketConn, error)
}

// services are what the gateway serves on its overlay addresses, to sessions alone.
type services struct {
	http  *http.Server
	echos []net.PacketConn
	wg    sync.WaitGroup
}

// serve starts the services on each address. known tells a live session's address.
func serve(stack stackListener, addrs []netip.Addr, h http.Handler, known func(netip.Addr) bool, perAddr int, log *slog.Logger) (*services, error) {
	s := &services{http: &http.Server{
		Handler: h, ReadHeaderTimeout: insideRead, ReadTimeout: insideRead, WriteTimeout: insideWrite, IdleTimeout: insideIdle,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	limit := &connLimit{per: perAddr, known: known, open: map[netip.Addr]int{}}
	for _, a := range addrs {
		l, err := stack.ListenTCP(netip.AddrPortFrom(a, wire.InsidePort))
		if err != nil {
			return nil, errors.Join(err, s.close())
		}
		s.wg.Go(func() { _ = s.http.Serve(limitListener{l, limit}) })
		echo, err := stack.ListenUDP(netip.AddrPortFrom(a, wire.EchoPort))
		if err != nil {
			return nil, errors.Join(err, l.Close(), s.close())
		}
		s.echos = append(s.echos, echo)
		s.wg.Go(func() { answerEcho(echo, known) })
	}
	return s, nil
}

// close ends the services and waits for requests under way, which the forwarder has cut off already.
func (s *services) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.http.Close()
	}
	for _, e := range s.echos {
		err = errors.Join(err, e.Close())
	}
	s.wg.Wait()
	return err
}

// answerEcho sends every datagram of a session back to it, as it came (RFC 862). Longer ones than [wire.MaxEcho] are dropped.
func answerEcho(c net.PacketConn, known func(netip.Addr) bool) {
	buf := make([]byte, wire.MaxEcho+1)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if addr, ok := addrOf(from); ok && n <= wire.MaxEcho && known(addr) {
			_, _ = c.WriteTo(buf[:n], from) // a lost answer is as good as a lost question
		}
	}
}

// connLimit bounds the connections of one session to the services.
type connLimit struct {
	per   int
	known func(netip.Addr) bool
	mu    sync.Mutex
	open  map[netip.Addr]int
}

func (l *connLimit) take(a netip.Addr) bool {
	if !l.known(a) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[a] >= l.per {
		return false
	}
	l.open[a]++
	return true
}

func (l *connLimit) give(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[a]--; l.open[a] <= 0 {
		delete(l.open, a)
	}
}

// limitListener closes connections over the limit at once.
type limitListener struct {
	net.Listener
	limit *connLimit
}

// Accept waits for the next connection within the limit.
func (l limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		addr, ok := addrOf(c.RemoteAddr())
		if ok && l.limit.take(addr) {
			return &limitedConn{Conn: c, done: sync.OnceFunc(func() { l.limit.give(addr) })}, nil
		}
		_ = c.Close()
	}
}

type limitedConn struct {
	net.Conn
	done func()
}

// Close closes the connection and gives its place back.
func (c *limitedConn) Close() error {
	defer c.done()
	return c.Conn.Close()
}

func addrOf(a net.Addr) (netip.Addr, bool) {
	if a == nil {
		return netip.Addr{}, false
	}
	p, err := netip.ParseAddrPort(a.String())
	return p.Addr().Unmap().WithZone(""), err == nil
}

// insideHandler answers a session's questions about itself. Who asks is known by the source address, which WireGuard has
// authenticated.
func (d *door) insideHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathInsideMe, d.inside(d.serveMe))
	mux.HandleFunc("POST "+wire.PathRenew, d.inside(d.serveRenew))
	mux.HandleFunc("POST "+wire.PathReach, d.inside(d.serveReach))
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
		v, err := serve(r, s)
		if err != nil {
			d.log.Warn("request inside the tunnel failed", "session", s.id, "code", problem.CodeOf(err), "err", err)
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
	return wire.InsideSession{
		Session: s.id, Gateway: d.name, Addresses: s.addrs, Routes: s.routes(), Grants: s.grants,
		Expires: lease.Expires, Ends: lease.Ends, Flows: s.carrier.Counts(),
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
	target, err := netip.ParseAddrPort(req.Target)
	if err != nil || target.Port() == 0 {
		return nil, problem.New(problem.BadRequest, "the target is not an IP address and a port", "name the target as IP:PORT")
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
	return s.carrier.Reach(target), nil
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
