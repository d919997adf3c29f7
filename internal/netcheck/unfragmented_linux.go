package netcheck

import "golang.org/x/sys/unix"

// dontFragment has a socket's packets refused rather than fragmented, and takes no notice of what the kernel believes of the
// path (ip(7), IP_PMTUDISC_PROBE).
func dontFragment(fd uintptr, v6 bool) error {
	if v6 {
		return unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	}
	return unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
}
