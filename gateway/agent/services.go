package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/wire"
)

// stackListener is what the services ask of the network stack.
type stackListener interface {
	ListenTCP(netip.AddrPort) (net.Listener, error)
	ListenUDP(netip.AddrPort) (net.PacketConn, error)
}

// services are what the gateway serves on its overlay addresses, to sessions alone: HTTP, echo and DNS. Connections count as
// their session's flows do.
type services struct {
	http    *http.Server
	dns     *names.Server
	open    []interface{ Close() error }
	serving sync.WaitGroup
}

// serve starts the services on each address.
func serve(stack stackListener, addrs []netip.Addr, h http.Handler, fwd *forward.Forwarder, dns *names.Server, log *slog.Logger) (*services, error) {
	s := &services{dns: dns, http: &http.Server{
		Handler: h, ReadHeaderTimeout: insideRead, ReadTimeout: insideRead, WriteTimeout: insideWrite, IdleTimeout: insideIdle,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	for _, a := range addrs {
		if err := s.serveAt(stack, a, fwd); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	return s, nil
}

func (s *services) serveAt(stack stackListener, a netip.Addr, fwd *forward.Forwarder) error {
	web, err := stack.ListenTCP(netip.AddrPortFrom(a, wire.InsidePort))
	if err != nil {
		return err
	}
	s.serving.Go(func() { _ = s.http.Serve(counted{web, fwd}) })
	echo, err := stack.ListenUDP(netip.AddrPortFrom(a, wire.EchoPort))
	if err != nil {
		return err
	}
	s.open = append(s.open, echo)
	s.serving.Go(func() { answerEcho(echo, fwd) })
	questions, err := stack.ListenUDP(netip.AddrPortFrom(a, wire.DNSPort))
	if err != nil {
		return err
	}
	s.open = append(s.open, questions)
	s.serving.Go(func() { s.dns.ServePacket(questions) })
	stream, err := stack.ListenTCP(netip.AddrPortFrom(a, wire.DNSPort))
	if err != nil {
		return err
	}
	s.open = append(s.open, stream)
	s.serving.Go(func() { s.dns.ServeStream(counted{stream, fwd}) })
	return nil
}

// close ends the services and waits for requests under way, which the forwarder has cut off already.
func (s *services) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.http.Close()
	}
	for _, c := range s.open {
		err = errors.Join(err, c.Close())
	}
	s.dns.Close()
	s.serving.Wait()
	return err
}

// answerEcho sends every datagram of a session back to it, as it came (RFC 862). Longer ones than [wire.MaxEcho] are dropped,
// and those over the session's rate.
func answerEcho(c net.PacketConn, fwd *forward.Forwarder) {
	buf := make([]byte, wire.MaxEcho+1)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		addr, ok := addrOf(from)
		if s := fwd.Find(addr); ok && n <= wire.MaxEcho && s != nil && s.TakeEcho() {
			_, _ = c.WriteTo(buf[:n], from) // a lost answer is as good as a lost question
		}
	}
}

// counted takes the connections that their sessions may have and closes the others at once.
type counted struct {
	net.Listener
	fwd *forward.Forwarder
}

// Accept waits for the next connection within its session's limits.
func (l counted) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if served := l.fwd.Serve(c); served != nil {
			return served, nil
		}
	}
}

func addrOf(a net.Addr) (netip.Addr, bool) {
	if a == nil {
		return netip.Addr{}, false
	}
	p, err := netip.ParseAddrPort(a.String())
	return p.Addr().Unmap().WithZone(""), err == nil
}
