// Package udpconn opens UDP sockets for programs that move many packets: it receives and sends them in batches, with the
// kernel's coalescing (UDP_GRO) and segmentation (UDP_SEGMENT) where there is such a thing, and never blocks in sending.
//
// A datagram received may be a run of several of one size, the last perhaps shorter. It can be sent on as it is.
package udpconn

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
)

// Sizes in bytes.
const (
	// MaxRun is the most that is sent in one piece. The kernel segments a run in software, at more than twice the cost, as
	// soon as the packet with all its headers reaches 65,536 bytes, link header included (gso_features_check). 42 bytes are
	// Ethernet, IPv4 and UDP; 48 more leave room for IPv6 and a VLAN tag.
	MaxRun = 1<<16 - 42 - 48 - 1

	// MaxSegments is how many datagrams one run may have (UDP_MAX_SEGMENTS of kernels before 6.9).
	MaxSegments = 64

	// DefaultBuffer is what a socket asks the kernel for in each direction: 25 ms at 2.5 Gbit/s.
	DefaultBuffer = 8 << 20

	maxDatagram = 1 << 16
)

// Options configure [Listen].
type Options struct {
	Network   string // udp, udp4 or udp6; default udp: both families on one socket where the address allows it
	Addr      string // "host:port"; default ":0"
	ReusePort bool   // several sockets on one port, between which the kernel shares the peers; Linux only
	Buffer    int    // bytes that the kernel may hold in each direction; default [DefaultBuffer]
}

// Validate fills defaults.
func (o *Options) Validate() error {
	if o.Network == "" {
		o.Network = "udp"
	}
	if o.Addr == "" {
		o.Addr = ":0"
	}
	if o.Buffer == 0 {
		o.Buffer = DefaultBuffer
	}
	if o.Buffer < 0 {
		return errors.New("a socket's buffer cannot be negative")
	}
	return nil
}

// Conn is a UDP socket. Any goroutine may send, each with a [Queue] of its own; any may read, each with a [Batch] of its
// own.
type Conn struct {
	udp   *net.UDPConn
	raw   syscall.RawConn
	local netip.AddrPort
	platform
}

// Listen opens a socket.
func Listen(ctx context.Context, opts Options) (*Conn, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error { return prepare(raw, &opts) }}
	pc, err := lc.ListenPacket(ctx, opts.Network, opts.Addr)
	if err != nil {
		return nil, fmt.Errorf("open a UDP socket on %s: %w", opts.Addr, err)
	}
	c := &Conn{udp: pc.(*net.UDPConn)}
	c.local = unmap(c.udp.LocalAddr().(*net.UDPAddr).AddrPort())
	if c.raw, err = c.udp.SyscallConn(); err == nil {
		err = c.setUp(&opts)
	}
	if err != nil {
		_ = c.udp.Close()
		return nil, fmt.Errorf("set up a UDP socket on %s: %w", opts.Addr, err)
	}
	return c, nil
}

// LocalAddr is the address that is bound.
func (c *Conn) LocalAddr() netip.AddrPort { return c.local }

// Close closes the socket, which ends every read with [net.ErrClosed].
func (c *Conn) Close() error { return c.udp.Close() }

// Datagram is what one read gave: one datagram, or a run of several.
type Datagram struct {
	Data    []byte // valid until the batch is read into again
	Segment int    // the size of each but the last, which may be shorter
	From    netip.AddrPort
	Local   netip.Addr // the address that it was sent to; not valid where the socket is bound to one
}

// Stats are the kernel's view of a socket.
type Stats struct {
	ReceiveBuffer int    // bytes that it holds at most, its own overhead left out; 0 where that is not known
	SendBuffer    int    //
	Overflow      uint32 // datagrams dropped because nobody read them in time, modulo 2³²
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
