// Package kernel has the kernel speak WireGuard for a tunnel.
//
// The WireGuard interface lives in a network namespace that nobody else can enter by name and that holds nothing but it, a loopback
// interface, and one end of a virtual cable whose other end is the host's interface:
//
//	host                        namespace of this process
//	culvert0 ═══ cable ═══ host0 ── forwarding ── wg0 ── UDP on loopback ── sockets of this process ── paths
//
// So three things hold. What a killed process leaves behind is nothing: with its last descriptor the namespace goes, with that its end of
// the cable, and with that the host's end, its addresses and routes. The kernel's UDP socket, which takes authentic packets from
// anywhere and answers to wherever they last came from, can be reached by nobody but this process; path checks remain the only way in.
// And it needs no port of the host's.
package kernel

import (
	"net/netip"

	"github.com/culvertnet/culvert/internal/problem"
)

// DefaultMTU is the interface's before anything is known of paths, in bytes.
const DefaultMTU = 1420

// Options configure a [Device].
type Options struct {
	MTU int // bytes, 1280 (RFC 8200, section 5) to 65535; default [DefaultMTU]
}

// Validate fills in the defaults and refuses what cannot work, with the code usage.
func (o *Options) Validate() error {
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.MTU < 1280 || o.MTU > 65535 {
		return problem.New(problem.Usage, "an interface's MTU is 1280 to 65535 bytes", "leave it out")
	}
	return nil
}

// Open makes the device and the cable, whose end on the host, see [Device.Name], is down and has no address. Code
// needs-privilege without CAP_SYS_ADMIN and CAP_NET_ADMIN, unsupported where the kernel has no WireGuard.
func Open(opts Options) (*Device, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	return open(opts)
}

// port is where the device listens, in a namespace where nobody else does.
const port = 51820

// address is where the device takes packets.
var address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
