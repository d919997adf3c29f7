//go:build !linux

package forward

import (
	"errors"
	"net/netip"
)

// setFragment leaves fragmenting to the system's defaults.
func setFragment(int, bool, bool) error { return errors.ErrUnsupported }

// pathMTU is not known here.
func pathMTU(int, netip.Addr) int { return 0 }

// attempt is not made here.
type attempt struct{}

// now waits where the socket is full.
func (o *outlet) now(b []byte) error { return o.wait(b) }
