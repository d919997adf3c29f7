//go:build !linux

package forward

import (
	"context"
	"net"
	"net/netip"
	"syscall"
)

// dialTCP opens a connection to an address, before ctx ends.
func dialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1} // see [relay.rest]
	return d.DialContext(ctx, "tcp", to.String())
}

// unicastOnly lets a UDP socket be as it is.
func unicastOnly(string, string, syscall.RawConn) error { return nil }
