package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvertnet/culvert/internal/wire"
)

// Bounds of the forwarder.
const (
	maxMessage    = 65535           // a DNS message over TCP, bytes (RFC 1035, section 4.2.2)
	maxQueries    = 256             // in flight at a time; what comes on top is dropped, and asked again by whoever asked
	maxConns      = 64              // TCP connections at a time
	answerTimeout = 4 * time.Second // of one server
	idleTimeout   = 10 * time.Second
)

// control prepares a socket before it is used; see [net.Dialer].
type control = func(network, address string, c syscall.RawConn) error

// forwarder answers DNS queries by passing them on: granted names to the gateway, everything else to the system's own servers.
// It reads no more of a message than its question and, from the gateway, the addresses in the answer.
type forwarder struct {
	scope    *scope
	upstream func() []netip.AddrPort // the system's servers, as they are now
	control  control                 // of sockets towards the system's servers
	inside   control                 // of sockets towards the gateway's
	log      *slog.Logger
	tunnel   uint16 // the port that the gateway's servers answer on

	packets  *packetConn
	listener net.Listener
	slots    chan struct{}
	conns    chan struct{}
	ctx      context.Context
	cancel   context.CancelFunc
	wait     sync.WaitGroup
}

// startForwarder listens on UDP and TCP on one port of address.
func startForwarder(ctx context.Context, address string, f *forwarder) (err error) {
	f.slots, f.conns = make(chan struct{}, maxQueries), make(chan struct{}, maxConns)
	if f.tunnel == 0 {
		f.tunnel = wire.DNSPort
	}
	f.ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	// The same port has to be free for both.
	for range 16 {
		if f.packets, err = listenPackets(address); err != nil {
			return fmt.Errorf("listen for dns: %w", err)
		}
		if f.listener, err = net.Listen("tcp", net.JoinHostPort(hostOf(address), fmt.Sprint(f.port()))); err == nil {
			f.wait.Go(f.servePackets)
			f.wait.Go(f.serveConns)
			return nil
		}
		f.packets.conn.Close()
	}
	return fmt.Errorf("listen for dns: %w", err)
}

func hostOf(address string) string {
	host, _, _ := net.SplitHostPort(address)
	return host
}

func (f *forwarder) port() uint16 { return f.packets.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func (f *forwarder) close() {
	f.cancel()
	f.packets.conn.Close()
	f.listener.Close()
	f.wait.Wait()
}

func (f *forwarder) servePackets() {
	buf := make([]byte, maxMessage)
	for {
		n, from, err := f.packets.read(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		select {
		case f.slots <- struct{}{}:
		default:
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		f.wait.Go(func() {
			defer func() { <-f.slots }()
			if answer := f.answer("udp", query); answer != nil {
				f.packets.reply(answer, from)
			}
		})
	}
}

func (f *forwarder) serveConns() {
	for {
		conn, err := f.listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		select {
		case f.conns <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		f.wait.Go(func() {
			defer func() { <-f.conns }()
			f.serveConn(conn)
		})
	}
}

// serveConn answers one query after the other, each with its length before it (RFC 1035, section 4.2.2).
func (f *forwarder) serveConn(conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(f.ctx, func() { conn.Close() })
	defer stop()
	for {
		_ = conn.SetDeadline(time.Now().Add(idleTimeout))
		query, err := readFramed(conn)
		if err != nil {
			return
		}
		answer := f.answer("tcp", query)
		if answer == nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(idleTimeout))
		if writeFramed(conn, answer) != nil {
			return
		}
	}
}

func readFramed(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

func writeFramed(w io.Writer, msg []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...))
	return err
}

// answer gives the answer to a query, or nil where there is none to give: whoever sent what is no query hears nothing.
func (f *forwarder) answer(network string, query []byte) []byte {
	header, question, err := parseQuery(query)
	if err != nil {
		return nil
	}
	if !f.scope.covers(question.Name.String()) {
		return f.ask(network, query, header, question, f.upstream(), f.control)
	}
	servers := make([]netip.AddrPort, len(f.scope.servers))
	for i, addr := range f.scope.servers {
		servers[i] = netip.AddrPortFrom(addr, f.tunnel)
	}
	answer := f.ask(network, query, header, question, servers, f.inside)
	if !f.credible(answer) {
		f.log.Warn("the gateway answers a name with an address that is not its to give", "name", question.Name.String())
		return failure(header, question)
	}
	return answer
}

// parseQuery takes a message with exactly one question.
func parseQuery(msg []byte) (dnsmessage.Header, dnsmessage.Question, error) {
	var p dnsmessage.Parser
	header, err := p.Start(msg)
	if err != nil || header.Response {
		return header, dnsmessage.Question{}, errors.New("no dns query")
	}
	question, err := p.Question()
	return header, question, err
}

// ask passes a query on, to one server after the other, and gives the first answer to it, or word that none came.
func (f *forwarder) ask(network string, query []byte, h dnsmessage.Header, q dnsmessage.Question, servers []netip.AddrPort, control control) []byte {
	for _, server := range servers[:min(len(servers), 3)] {
		if answer, err := f.exchange(network, query, h.ID, server, control); err == nil {
			return answer
		}
	}
	return failure(h, q)
}

func (f *forwarder) exchange(network string, query []byte, id uint16, server netip.AddrPort, control control) ([]byte, error) {
	ctx, cancel := context.WithTimeout(f.ctx, answerTimeout)
	defer cancel()
	conn, err := (&net.Dialer{Control: control}).DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if network == "tcp" {
		if err := writeFramed(conn, query); err != nil {
			return nil, err
		}
		return readFramed(conn)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, maxMessage)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		// The socket is connected and its port random; the id is the other half of what tells an answer from a guess.
		if n >= 12 && binary.BigEndian.Uint16(buf) == id {
			return buf[:n], nil
		}
	}
}

// credible reports whether all addresses in an answer are the gateway's to give.
func (f *forwarder) credible(answer []byte) bool {
	var p dnsmessage.Parser
	if _, err := p.Start(answer); err != nil {
		return false
	}
	if p.SkipAllQuestions() != nil {
		return false
	}
	for {
		rr, err := p.Answer()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return true
		}
		if err != nil {
			return false
		}
		switch body := rr.Body.(type) {
		case *dnsmessage.AResource:
			if !f.scope.believable(netip.AddrFrom4(body.A)) {
				return false
			}
		case *dnsmessage.AAAAResource:
			if !f.scope.believable(netip.AddrFrom16(body.AAAA)) {
				return false
			}
		}
	}
}

// failure is SERVFAIL (RFC 1035, section 4.1.1) for a query.
func failure(h dnsmessage.Header, q dnsmessage.Question) []byte {
	msg := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true, RCode: dnsmessage.RCodeServerFailure},
		Questions: []dnsmessage.Question{q},
	}
	packed, err := msg.Pack()
	if err != nil {
		return nil
	}
	return packed
}
