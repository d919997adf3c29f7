package nat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// readPause keeps a socket that fails for good from taking a whole core.
const readPause = 5 * time.Millisecond

// ServerOptions configure a STUN server.
type ServerOptions struct {
	Addr   string       // UDP, for example ":3478"; an empty host takes IPv4 and IPv6 on one socket
	Logger *slog.Logger // defaults to slog.Default
}

// Validate fills defaults.
func (o *ServerOptions) Validate() error {
	if o.Addr == "" {
		return errors.New("a stun server needs an address to listen on")
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// ServerStats count datagrams since a server's start.
type ServerStats struct {
	Answered  uint64 // requests answered
	Small     uint64 // requests dropped because the answer would have been larger
	Malformed uint64 // anything else that was dropped
	Failed    uint64 // answers that the socket did not take
	Limited   uint64 // requests dropped because there were too many, see [Limiter]
}

// Server answers plain Binding requests (RFC 8489), and those that want the answer from another port (CHANGE-REQUEST, RFC 5780,
// section 7.2), by which a client learns how its NAT filters. It keeps no state, and its answer (32 bytes for IPv4, 44 for
// IPv6) is never larger than the request: a smaller request is dropped, so that nobody can use the server to amplify
// traffic towards a forged source. RFC 8489 would allow a request of 20 bytes, an amplification by 1.6 or 2.2;
// [BindingRequest] makes 44.
type Server struct {
	conn    *net.UDPConn
	other   *net.UDPConn // another port, from which answers are sent and nothing is read; nil where there is none
	log     *slog.Logger
	readers sync.WaitGroup
	stop    func() bool // detaches from the context
	limiter *Limiter

	answered, small, malformed, failed, limited atomic.Uint64
}

// Listen opens the socket and starts serving, until Close or until ctx ends.
func Listen(ctx context.Context, opts ServerOptions) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, "udp", opts.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen for stun: %w", err)
	}
	s := &Server{conn: pc.(*net.UDPConn), log: opts.Logger, limiter: NewLimiter()}
	if err := s.openOther(); err != nil {
		s.log.Warn("no second port for stun: clients cannot tell how their NAT filters", "err", err)
	}
	// One socket takes one reader at a time; the others meanwhile write their answers.
	for range min(max(2, runtime.GOMAXPROCS(0)), 8) {
		s.readers.Go(s.read)
	}
	s.stop = context.AfterFunc(ctx, s.shut)
	return s, nil
}

// openOther opens the port from which CHANGE-REQUEST is answered, at the same address.
func (s *Server) openOther() error {
	at := s.conn.LocalAddr().(*net.UDPAddr)
	network := "udp"
	if at.IP.To4() != nil {
		network = "udp4"
	}
	other, err := net.ListenUDP(network, &net.UDPAddr{IP: at.IP, Zone: at.Zone})
	if err != nil {
		return fmt.Errorf("listen for stun: %w", err)
	}
	_ = other.SetReadBuffer(1) // the kernel keeps its minimum of what nobody reads
	s.other = other
	return nil
}

// Addr is the bound address.
func (s *Server) Addr() net.Addr { return s.conn.LocalAddr() }

// Stats gives the counters.
func (s *Server) Stats() ServerStats {
	return ServerStats{
		Answered:  s.answered.Load(),
		Small:     s.small.Load(),
		Malformed: s.malformed.Load(),
		Failed:    s.failed.Load(),
		Limited:   s.limited.Load(),
	}
}

// Close stops serving and waits.
func (s *Server) Close() error {
	s.stop()
	s.shut()
	s.readers.Wait()
	return nil
}

// shut makes every reader return. Only the first call does anything, and what a later one says is of no interest.
func (s *Server) shut() {
	_ = s.conn.Close()
	if s.other != nil {
		_ = s.other.Close()
	}
}

func (s *Server) read() {
	in := make([]byte, MaxMessage)
	out := make([]byte, 0, MaxMessage)
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(in)
		switch {
		case err == nil:
			s.answer(in[:n], from, out)
		case errors.Is(err, net.ErrClosed):
			return
		default: // an ICMP error about an earlier answer, or a lack of buffers: a later read may succeed
			s.log.Debug("stun read failed", "err", err)
			time.Sleep(readPause)
		}
	}
}

// answer serves one datagram.
func (s *Server) answer(in []byte, from netip.AddrPort, out []byte) {
	out, change, ok := appendBindingResponse(out, in, from, true)
	conn := s.conn
	if change&changePort != 0 {
		conn = s.other
	}
	switch {
	case !ok || conn == nil || change&changeAddr != 0:
		s.malformed.Add(1)
	case len(out) > len(in):
		s.small.Add(1)
	case !s.limiter.Admit(from.Addr(), time.Now().UnixNano()):
		s.limited.Add(1)
	default:
		if _, err := conn.WriteToUDPAddrPort(out, from); err != nil {
			s.failed.Add(1)
			return
		}
		s.answered.Add(1)
	}
}

// AppendBindingResponse encodes the success response to a plain Binding request that came from from. ok is false for
// anything but a well-formed Binding request, and for one that demands what a plain server does not know: any
// comprehension-required attribute but PADDING. It does not allocate where dst has room, and it is up to the caller
// to send no response that is larger than the request.
func AppendBindingResponse(dst, request []byte, from netip.AddrPort) (response []byte, ok bool) {
	response, _, ok = appendBindingResponse(dst, request, from, false)
	return response, ok
}

// appendBindingResponse is [AppendBindingResponse] that takes CHANGE-REQUEST as well, if changes is set, and gives its flags.
func appendBindingResponse(dst, request []byte, from netip.AddrPort, changes bool) (response []byte, change byte, ok bool) {
	if !IsSTUN(request) || MessageType(request) != TypeBindingRequest || !from.IsValid() {
		return dst, 0, false
	}
	a := Walk(request)
	for a.Next() {
		switch {
		case a.Type >= firstOptionalAttr, a.Type == attrPadding:
		case a.Type == attrChangeRequest && changes && len(a.Value) == 4:
			change |= a.Value[3]
		default:
			return dst, 0, false
		}
	}
	if a.Bad {
		return dst, 0, false
	}
	start, id := len(dst), Transaction(request)
	dst = AppendHeader(dst, TypeBindingSuccess, id)
	dst = AppendMapped(dst, id, from)
	SetLength(dst[start:], len(dst)-start)
	return dst, change, true
}
