package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// Values of RFC 1928.
const (
	socksVersion = 5

	methodNone         = 0x00
	methodUnacceptable = 0xff

	commandConnect = 1

	addressIPv4 = 1
	addressName = 3
	addressIPv6 = 4

	replyDone               = 0x00
	replyFailed             = 0x01
	replyNotAllowed         = 0x02
	replyHostUnreachable    = 0x04
	replyRefused            = 0x05
	replyCommandUnsupported = 0x07
	replyAddressUnsupported = 0x08
)

// socksError is a request that gets a reply code instead of a connection.
type socksError struct {
	reply byte
	what  string
}

// Error says what was wrong with the request.
func (e *socksError) Error() string { return e.what }

// serveSOCKS serves one connection: greeting, CONNECT, bytes. UDP ASSOCIATE and BIND are refused.
func (s *Server) serveSOCKS(client *peeked) error {
	if err := greet(client); err != nil {
		return err
	}
	target, err := readRequest(client)
	if err != nil {
		if refusal, ok := errors.AsType[*socksError](err); ok {
			_ = writeReply(client, refusal.reply, netip.AddrPort{})
		}
		return err
	}
	_ = client.SetDeadline(time.Time{})
	remote, err := s.dial(s.ctx, target)
	if err != nil {
		_ = writeReply(client, replyFor(err), netip.AddrPort{})
		return err
	}
	if !s.track(remote) {
		_ = remote.Close()
		return writeReply(client, replyFailed, netip.AddrPort{})
	}
	defer s.untrack(remote)
	if err := writeReply(client, replyDone, bound(remote)); err != nil {
		return err
	}
	splice(client, remote, s.opts.Idle)
	return nil
}

// greet agrees on no authentication (RFC 1928, section 3): the connection's owner has been looked up already.
func greet(rw io.ReadWriter) error {
	var head [2]byte
	if _, err := io.ReadFull(rw, head[:]); err != nil {
		return fmt.Errorf("read the greeting: %w", err)
	}
	if head[0] != socksVersion {
		return fmt.Errorf("version %d is not SOCKS5", head[0])
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(rw, methods); err != nil {
		return fmt.Errorf("read the methods: %w", err)
	}
	if !slices.Contains(methods, methodNone) {
		_, _ = rw.Write([]byte{socksVersion, methodUnacceptable})
		return errors.New("the program insists on authentication, which this proxy does not ask for")
	}
	_, err := rw.Write([]byte{socksVersion, methodNone})
	return err
}

// readRequest reads a CONNECT request (RFC 1928, section 4) and gives its target as "host:port".
func readRequest(r io.Reader) (string, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", fmt.Errorf("read the request: %w", err)
	}
	if head[0] != socksVersion {
		return "", &socksError{replyFailed, fmt.Sprintf("version %d is not SOCKS5", head[0])}
	}
	host, err := readAddress(r, head[3])
	if err != nil {
		return "", err
	}
	var port [2]byte
	if _, err := io.ReadFull(r, port[:]); err != nil {
		return "", fmt.Errorf("read the port: %w", err)
	}
	if head[1] != commandConnect {
		return "", &socksError{replyCommandUnsupported, fmt.Sprintf("command %d is not CONNECT", head[1])}
	}
	return net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(port[:])))), nil
}

func readAddress(r io.Reader, kind byte) (string, error) {
	size := map[byte]int{addressIPv4: 4, addressIPv6: 16}[kind]
	if kind == addressName {
		var length [1]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return "", fmt.Errorf("read the name's length: %w", err)
		}
		size = int(length[0])
	}
	if size == 0 {
		return "", &socksError{replyAddressUnsupported, fmt.Sprintf("address type %d is unknown or empty", kind)}
	}
	raw := make([]byte, size)
	if _, err := io.ReadFull(r, raw); err != nil {
		return "", fmt.Errorf("read the address: %w", err)
	}
	if kind == addressName {
		return string(raw), nil
	}
	addr, _ := netip.AddrFromSlice(raw)
	return addr.String(), nil
}

// writeReply answers a request (RFC 1928, section 6).
func writeReply(w io.Writer, reply byte, bound netip.AddrPort) error {
	addr := bound.Addr()
	if !addr.IsValid() {
		addr = netip.IPv4Unspecified()
	}
	kind := byte(addressIPv4)
	if addr.Is6() {
		kind = addressIPv6
	}
	msg := append([]byte{socksVersion, reply, 0, kind}, addr.AsSlice()...)
	_, err := w.Write(binary.BigEndian.AppendUint16(msg, bound.Port()))
	return err
}

// replyFor maps an error to the reply codes that RFC 1928 has.
func replyFor(err error) byte {
	switch problem.CodeOf(err) {
	case problem.FlowDenied, problem.Denied:
		return replyNotAllowed
	case problem.BadRequest:
		return replyAddressUnsupported
	case problem.FlowUnreachable:
		if refused(errors.Unwrap(problem.From(err))) {
			return replyRefused
		}
		return replyHostUnreachable
	case problem.Timeout:
		return replyHostUnreachable
	default:
		return replyFailed
	}
}

// bound is the address that a connection to the target comes from, as far as it is known.
func bound(conn net.Conn) netip.AddrPort {
	if addr, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		local := addr.AddrPort()
		return netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	}
	return netip.AddrPort{}
}
