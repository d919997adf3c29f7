package nat

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/culvertnet/culvert/internal/wire"
)

// HostCandidates lists this host's usable addresses with port: no loopback (unless there is nothing else), no
// link-local, no point-to-point interfaces (other tunnels, too narrow to carry ours), none of the interfaces whose names are skipped, at most wire.MaxCandidates. IPv4 and IPv6 take turns,
// so that neither crowds out the other.
func HostCandidates(port uint16, skip func(iface string) bool) ([]wire.Candidate, error) {
	list, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	var ifaces []hostInterface
	for _, i := range list {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagPointToPoint != 0 {
			continue // an address on a tunnel would put one tunnel into another
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // it went away since it was listed
		}
		ifaces = append(ifaces, hostInterface{i.Name, i.Flags&net.FlagLoopback != 0, addrs})
	}
	return hostCandidates(ifaces, port, skip), nil
}

// SkipVirtual reports whether an interface's name is one that container engines and hypervisors give to the networks
// within this host, or that Culvert gives to its own: an address on it is of no use to a peer elsewhere.
func SkipVirtual(iface string) bool {
	for _, prefix := range []string{
		"docker", "br-", "virbr", "vmnet", "vboxnet", "cni", "cali", "flannel", "cilium", "lxcbr", "lxdbr", "podman",
		"nerdctl", "kube-", "weave", "culvert",
	} {
		if strings.HasPrefix(iface, prefix) {
			return true
		}
	}
	return false
}

// hostInterface is an interface that is up.
type hostInterface struct {
	name     string
	loopback bool
	addrs    []net.Addr
}

func hostCandidates(ifaces []hostInterface, port uint16, skip func(string) bool) []wire.Candidate {
	var v4, v6, loopback []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, i := range ifaces {
		if skip != nil && skip(i.name) {
			continue
		}
		for _, a := range i.addrs {
			addr, ok := usable(a)
			switch {
			case !ok || seen[addr]:
				continue
			case i.loopback || addr.IsLoopback():
				loopback = append(loopback, addr)
			case addr.Is4():
				v4 = append(v4, addr)
			default:
				v6 = append(v6, addr)
			}
			seen[addr] = true
		}
	}
	addrs := alternate(v4, v6)
	if len(addrs) == 0 {
		addrs = loopback
	}
	addrs = addrs[:min(len(addrs), wire.MaxCandidates)]
	out := make([]wire.Candidate, len(addrs))
	for i, a := range addrs {
		out[i] = wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(a, port)}
	}
	return out
}

// usable gives the address in a, unless no other host could ever send to it.
func usable(a net.Addr) (netip.Addr, bool) {
	ipnet, ok := a.(*net.IPNet)
	if !ok {
		return netip.Addr{}, false
	}
	addr, ok := netip.AddrFromSlice(ipnet.IP)
	addr = addr.Unmap()
	if !ok || addr.IsUnspecified() || addr.IsMulticast() || addr.IsLinkLocalUnicast() {
		return netip.Addr{}, false
	}
	return addr, true
}

// alternate takes one of each in turn.
func alternate(a, b []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, 0, len(a)+len(b))
	for i := range max(len(a), len(b)) {
		if i < len(a) {
			out = append(out, a[i])
		}
		if i < len(b) {
			out = append(out, b[i])
		}
	}
	return out
}
