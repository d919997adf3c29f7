package netcheck

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
)

// listenUnfragmented opens a UDP socket of to's family whose packets are never fragmented.
func listenUnfragmented(ctx context.Context, to netip.Addr) (net.PacketConn, error) {
	network := "udp4"
	if to.Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) { err = dontFragment(fd, to.Is6()) }); e != nil {
			return e
		}
		return err
	}}
	conn, err := lc.ListenPacket(ctx, network, ":0")
	if err != nil {
		return nil, fmt.Errorf("open a socket that does not fragment: %w", err)
	}
	return conn, nil
}
