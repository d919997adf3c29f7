package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Established takes stock of the TCP connections that are established now and gives what resets these and no others. Those that are
// only being opened are left out: they are tried again by themselves.
func (d *Device) Established() (reset func()) {
	var open []*tcp.Endpoint
	for _, e := range d.stack.RegisteredEndpoints() {
		if ep, ok := e.(*tcp.Endpoint); ok && established(ep.EndpointState()) {
			open = append(open, ep)
		}
	}
	return func() {
		for _, ep := range open {
			ep.Abort()
		}
	}
}

// established reports a connection of which the other side knows (RFC 9293, section 3.3.2).
func established(s tcp.EndpointState) bool {
	switch s {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateClosing, tcp.StateLastAck:
		return true
	}
	return false
}
