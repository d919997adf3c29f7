//go:build !linux

package kernel

import (
	"net/netip"
	"runtime"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
)

// Device is never made here.
type Device struct{ tunnel.Device }

func open(Options) (*Device, error) {
	return nil, problem.New(problem.Unsupported, "there is no kernel WireGuard for this program on "+runtime.GOOS, "use --mode proxy")
}

// Name is never asked.
func (*Device) Name() string { return "" }

// SetAddresses is never called.
func (*Device) SetAddresses([]netip.Addr) error { return nil }

// SetMTU is never called.
func (*Device) SetMTU(int) error { return nil }
