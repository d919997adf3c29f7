//go:build !linux

package forward

import (
	"errors"
	"net"
	"net/netip"
)

// pinger is a ping socket; there are some on Linux alone.
type pinger struct{ *net.UDPConn }

func newPinger(netip.Addr) (*pinger, error) { return nil, errors.ErrUnsupported }

func (*pinger) next(func([]byte, netip.Addr)) error { return errors.ErrUnsupported }
