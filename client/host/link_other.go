//go:build !linux

package host

import (
	"net/netip"
	"runtime"
	"syscall"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/internal/problem"
)

// link is never made here.
type link struct{ name string }

func openLink(Options) (*link, error)  { return nil, unsupported() }
func adoptLink(Options) (*link, error) { return nil, unsupported() }

func unsupported() error {
	return problem.New(problem.Unsupported, "network interfaces are not supported on "+runtime.GOOS, "use --mode proxy")
}

func (*link) device() tun.Device              { return nil }
func (*link) close() error                    { return nil }
func (*link) setAddresses([]netip.Addr) error { return unsupported() }
func (*link) setMTU(int) error                { return unsupported() }
func (*link) skippedAddresses() []netip.Addr  { return nil }

func (*link) bound(string, string, syscall.RawConn) error { return nil }

func (*link) established() (func() error, error) { return nil, unsupported() }

func (*link) setRoutes([]netip.Prefix, []netip.Addr) ([]Yield, error) { return nil, unsupported() }
func (*link) sharedRoutes() []netip.Prefix                            { return nil }
func (*link) lead([]netip.Addr) error                                 { return unsupported() }

func privileged() bool { return false }
