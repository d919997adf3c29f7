package netcheck

import "golang.org/x/sys/windows"

// Option names of ws2ipdef.h.
const (
	ipDontFragment = 14
	ipv6DontFrag   = 14
)

// dontFragment has a socket's packets refused rather than fragmented.
func dontFragment(fd uintptr, v6 bool) error {
	if v6 {
		return windows.SetsockoptInt(windows.Handle(fd), windows.IPPROTO_IPV6, ipv6DontFrag, 1)
	}
	return windows.SetsockoptInt(windows.Handle(fd), windows.IPPROTO_IP, ipDontFragment, 1)
}
