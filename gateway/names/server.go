package names

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// Bounds of the server.
const (
	edns         = 1232 // bytes of a message over UDP that passes every path (DNS flag day 2020)
	maxQuery     = 1024 // bytes; a question that is longer is none of ours
	streamIdle   = 10 * time.Second
	streamLimit  = 100                    // questions of one connection
	patience     = 300 * time.Millisecond // for a name that may not exist; then it is answered as if it did
	upstreamTime = 5 * time.Second        // for records that only upstream knows
)

// Session is what the server asks of the session behind an address.
type Session interface {
	// KnowsName tells whether the session may ask for a canonical name.
	KnowsName(name string) bool
	// ExactName tells whether a grant spells the name out.
	ExactName(name string) bool
	// Book holds the session's service addresses.
	Book() *Book
	// TakeQuery takes a question from the session's allowance; false drops it.
	TakeQuery() bool
	// TakeLookup takes one of the session's places for questions upstream; done gives it back.
	TakeLookup() (done func(), ok bool)
	// NameRefused is told of a name that the session may not ask for.
	NameRefused(name string)
}

// ServerOptions configure a [Server].
type ServerOptions struct {
	Resolver *Resolver
	Ranges   Ranges
	Session  func(netip.Addr) Session // behind an address of the tunnel; nil where there is none
	Logger   *slog.Logger
}

// Validate checks the options and fills in defaults.
func (o *ServerOptions) Validate() error {
	if o.Resolver == nil || o.Session == nil {
		return errors.New("a server needs a resolver and a way to find sessions")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Server answers DNS inside the tunnel (RFC 1035), over UDP and TCP.
type Server struct {
	opts   ServerOptions
	counts serverCounts

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
}

type serverCounts struct{ answered, refused, limited, malformed atomic.Uint64 }

// ServerCounts are what a server has done since it was made.
type ServerCounts struct {
	Answered  uint64 // questions within a grant, whatever the answer
	Refused   uint64 // names that no grant holds
	Limited   uint64 // dropped: over the session's allowance
	Malformed uint64 // dropped: no question
}

// NewServer makes a server. It serves what it is given until that is closed.
func NewServer(opts ServerOptions) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Server{opts: opts}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Close ends questions under way and waits for them. Sockets and listeners have to be closed before.
func (s *Server) Close() {
	s.cancel()
	s.work.Wait()
}

// Counts reads the counters.
func (s *Server) Counts() ServerCounts {
	c := &s.counts
	return ServerCounts{Answered: c.answered.Load(), Refused: c.refused.Load(), Limited: c.limited.Load(), Malformed: c.malformed.Load()}
}

// ServePacket answers questions over UDP until conn is closed. What can be answered from memory is answered in turn; what
// has to be asked upstream waits beside.
func (s *Server) ServePacket(conn net.PacketConn) {
	buf := make([]byte, maxQuery+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		session := s.session(from)
		if session == nil || n > maxQuery {
			s.counts.malformed.Add(1)
			continue
		}
		q, reply := s.parse(session, buf[:n])
		if q == nil {
			send(conn, from, reply, edns)
			continue
		}
		room := udpRoom(q)
		if !s.slow(session, q) {
			send(conn, from, s.answer(s.ctx, session, q), room)
			continue
		}
		done, ok := session.TakeLookup()
		if !ok {
			send(conn, from, failure(q, dns.RcodeServerFailure), room)
			continue
		}
		s.work.Go(func() {
			defer done()
			send(conn, from, s.answer(s.ctx, session, q), room)
		})
	}
}

// send sends a reply, cut to what fits; nil sends nothing.
func send(conn net.PacketConn, to net.Addr, reply *dns.Msg, room int) {
	if reply == nil {
		return
	}
	reply.Truncate(room)
	if b, err := reply.Pack(); err == nil {
		_, _ = conn.WriteTo(b, to) // a lost answer is as good as a lost question
	}
}

// udpRoom is how long an answer may be (RFC 6891, section 6.2.3).
func udpRoom(q *dns.Msg) int {
	if opt := q.IsEdns0(); opt != nil {
		return min(max(int(opt.UDPSize()), dns.MinMsgSize), edns)
	}
	return dns.MinMsgSize
}

// ServeStream answers questions over TCP until l is closed (RFC 7766). Each connection is one goroutine; whoever made l bounds
// their number.
func (s *Server) ServeStream(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.work.Go(func() {
			stop := context.AfterFunc(s.ctx, func() { _ = c.Close() })
			defer stop()
			defer c.Close()
			if session := s.session(c.RemoteAddr()); session != nil {
				s.serveConn(c, session)
			}
		})
	}
}

func (s *Server) serveConn(c net.Conn, session Session) {
	buf := make([]byte, maxQuery)
	for range streamLimit {
		_ = c.SetDeadline(time.Now().Add(streamIdle))
		if _, err := io.ReadFull(c, buf[:2]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(buf))
		if n > maxQuery {
			s.counts.malformed.Add(1)
			return
		}
		if _, err := io.ReadFull(c, buf[:n]); err != nil {
			return
		}
		q, reply := s.parse(session, buf[:n])
		if q != nil {
			reply = s.answer(s.ctx, session, q)
		}
		if reply == nil {
			return
		}
		b, err := reply.Pack()
		if err != nil || len(b) > dns.MaxMsgSize {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)); err != nil {
			return
		}
	}
}

func (s *Server) session(from net.Addr) Session {
	if from == nil {
		return nil
	}
	p, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return nil
	}
	return s.opts.Session(p.Addr().Unmap().WithZone(""))
}

// parse reads a message. It gives a question to answer, or what to say where there is none: nil for nothing.
func (s *Server) parse(session Session, b []byte) (q, reply *dns.Msg) {
	if !session.TakeQuery() {
		s.counts.limited.Add(1)
		return nil, nil
	}
	const head, response = 12, 1 << 15
	if len(b) < head || binary.BigEndian.Uint16(b[2:])&response != 0 {
		s.counts.malformed.Add(1)
		return nil, nil
	}
	q = new(dns.Msg)
	if err := q.Unpack(b); err != nil {
		s.counts.malformed.Add(1)
		broken := &dns.Msg{MsgHdr: dns.MsgHdr{Id: binary.BigEndian.Uint16(b)}}
		return nil, failure(broken, dns.RcodeFormatError)
	}
	switch {
	case q.Opcode != dns.OpcodeQuery:
		return nil, failure(q, dns.RcodeNotImplemented)
	case len(q.Question) != 1 || len(q.Answer) > 0:
		return nil, failure(q, dns.RcodeFormatError)
	case q.IsEdns0() != nil && q.IsEdns0().Version() != 0:
		return nil, failure(q, dns.RcodeBadVers)
	case q.Question[0].Qclass != dns.ClassINET:
		return nil, failure(q, dns.RcodeRefused)
	}
	return q, nil
}

// failure is a reply that holds nothing but a code.
func failure(q *dns.Msg, rcode int) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(q, rcode)
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(edns, false)
		m.IsEdns0().SetExtendedRcode(uint16(rcode))
	}
	return m
}
