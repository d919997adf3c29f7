package policy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Proto is a flow's protocol.
type Proto uint8

// The protocols that an allow line may name.
const (
	TCP Proto = 1 << iota
	UDP
	ICMP
)

// line is one parsed allow line:
//
//	line     = protocols SP target [":" ports]
//	protocols = ("tcp" / "udp" / "icmp") *("," …)
//	target   = IPv4 / IPv4 "/" bits / "[" IPv6 "]" / "[" IPv6 "/" bits "]" / ["*."] name / "internet"
//	ports    = "*" / item *("," item)
//	item     = port / port "-" port
//
// icmp stands alone and takes no ports; its IPv6 target may do without the brackets.
type line struct {
	protos   Proto
	internet bool
	host     hostName     // "" unless the target is a name
	prefix   netip.Prefix // neither internet nor a name; masked
	ports    []portRange  // merged and sorted; empty for icmp
}

// portRange is inclusive at both ends.
type portRange struct{ lo, hi uint16 }

var protoNames = map[string]Proto{"tcp": TCP, "udp": UDP, "icmp": ICMP}

// parseLine reads an allow line. The error's path is left to the caller.
func parseLine(text string) (line, *Error) {
	if len(text) > MaxLine {
		return line{}, fault("", fmt.Sprintf("an allow line is longer than %d bytes", MaxLine), "split it")
	}
	fields := strings.Fields(text)
	if len(fields) != 2 {
		return line{}, fault("", fmt.Sprintf("%q is not protocols, a space and a target", text), `write it like "tcp,udp 10.0.0.0/24:53"`)
	}
	protos, err := parseProtos(fields[0])
	if err != nil {
		return line{}, err
	}
	target, ports, hasPorts, err := splitTarget(fields[1])
	if err != nil {
		return line{}, err
	}
	l := line{protos: protos, internet: target == "internet"}
	if !l.internet && strings.EqualFold(target, "internet") {
		return line{}, fault("", fmt.Sprintf("unknown target %q", target), `write "internet" in lower case`)
	}
	switch {
	case l.internet:
	case isName(target):
		l.host, err = parseHost(target)
	default:
		l.prefix, err = parseTarget(target)
	}
	if err != nil {
		return line{}, err
	}
	err = l.setPorts(fields[1], ports, hasPorts)
	return l, err
}

func parseProtos(text string) (Proto, *Error) {
	var all Proto
	for name := range strings.SplitSeq(text, ",") {
		p, ok := protoNames[name]
		if !ok {
			return 0, fault("", fmt.Sprintf("unknown protocol %q", name), "use tcp, udp or icmp, in lower case, joined by commas")
		}
		if all&p != 0 {
			return 0, fault("", fmt.Sprintf("protocol %q stands twice", name), "keep one")
		}
		all |= p
	}
	if all&ICMP != 0 && all != ICMP {
		return 0, fault("", "icmp has no ports, so it cannot share a line with tcp or udp", "write icmp on a line of its own")
	}
	return all, nil
}

// splitTarget takes ports off a target, and the brackets off an IPv6 one.
func splitTarget(s string) (target, ports string, hasPorts bool, err *Error) {
	if rest, ok := strings.CutPrefix(s, "["); ok {
		target, rest, ok = strings.Cut(rest, "]")
		ports, hasPorts = strings.CutPrefix(rest, ":")
		if !ok || rest != "" && !hasPorts {
			return "", "", false, fault("", fmt.Sprintf("%q is no target", s), "write an IPv6 target like [fd00::1]:443 or [fd00::/64]:443")
		}
		if strings.Count(target, ":") < 2 {
			return "", "", false, fault("", fmt.Sprintf("only IPv6 targets stand in brackets, not %q", target), "remove the brackets")
		}
		return target, ports, hasPorts, nil
	}
	if strings.Count(s, ":") >= 2 {
		return s, "", false, nil
	}
	target, ports, hasPorts = strings.Cut(s, ":")
	return target, ports, hasPorts, nil
}

// parseTarget reads an address or a CIDR.
func parseTarget(s string) (netip.Prefix, *Error) {
	host, _, isCIDR := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{}, badTarget(s, isCIDR)
	}
	if addr.Zone() != "" {
		return netip.Prefix{}, fault("", fmt.Sprintf("%q names an interface", s), "remove the part from % on")
	}
	if addr.Is4In6() {
		return netip.Prefix{}, fault("", fmt.Sprintf("%q is an IPv4 address in IPv6 dress", s), fmt.Sprintf("write %s", addr.Unmap()))
	}
	if !isCIDR {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, badTarget(s, true)
	}
	if prefix != prefix.Masked() {
		return netip.Prefix{}, fault("", fmt.Sprintf("%s has bits set beyond its /%d", prefix, prefix.Bits()),
			fmt.Sprintf("write %s for the range or %s for the one address", prefix.Masked(), addr))
	}
	return prefix, nil
}

func badTarget(s string, isCIDR bool) *Error {
	next := `write an address, a CIDR, a name or "internet"`
	if isCIDR && strings.Trim(s, "0123456789./") != "" && !strings.Contains(s, ":") {
		next = "a name stands for one host: write it without the /"
	}
	return fault("", fmt.Sprintf("%q is no address and no CIDR", s), next)
}

// isName tells whether a target is meant to be a name: it has a character that no IPv4 address has, and none that only
// IPv6 addresses and CIDRs have.
func isName(s string) bool {
	return strings.Trim(s, "0123456789.") != "" && !strings.ContainsAny(s, ":/")
}

// setPorts checks that ports stand where they have to and nowhere else.
func (l *line) setPorts(target, ports string, hasPorts bool) *Error {
	if l.protos == ICMP {
		if hasPorts {
			return fault("", fmt.Sprintf("icmp has no ports, but %q has", target), "remove the part from the last : on")
		}
		return nil
	}
	if !hasPorts {
		next := fmt.Sprintf("write %s:443 for one port or %s:* for all", target, target)
		if l.prefix.Addr().Is6() {
			bare := strings.Trim(target, "[]")
			next = fmt.Sprintf("write [%s]:443 for one port or [%s]:* for all", bare, bare)
		}
		return fault("", fmt.Sprintf("%q has no port", target), next)
	}
	var err *Error
	l.ports, err = parsePorts(ports)
	return err
}

func parsePorts(text string) ([]portRange, *Error) {
	if text == "*" {
		return []portRange{{1, 65535}}, nil
	}
	items := strings.Split(text, ",")
	if len(items) > MaxPorts {
		return nil, fault("", fmt.Sprintf("more than %d ports in one line", MaxPorts), "use ranges, or split the line")
	}
	ranges := make([]portRange, 0, len(items))
	for _, item := range items {
		low, high, isRange := strings.Cut(item, "-")
		if !isRange {
			high = low
		}
		lo, okLo := parsePort(low)
		hi, okHi := parsePort(high)
		if !okLo || !okHi {
			return nil, fault("", fmt.Sprintf("%q is no port", item), "write a port from 1 to 65535, a range 8000-8100, a list 53,853, or *")
		}
		if lo > hi {
			return nil, fault("", fmt.Sprintf("the range %q runs backwards", item), fmt.Sprintf("write %d-%d", hi, lo))
		}
		ranges = append(ranges, portRange{lo, hi})
	}
	return mergePorts(ranges), nil
}

// parsePort takes 1 to 65535 in plain decimal, without a sign or leading zeros.
func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	return uint16(n), true
}

// checkEffect refuses a range of which every address is always denied: it would silently give nothing.
func (l *line) checkEffect() *Error {
	if l.host.name != "" {
		return l.host.checkEffect()
	}
	if l.internet || l.prefix.IsSingleIP() {
		return nil
	}
	for i := range closedRanges {
		if c := &closedRanges[i]; c.prefix.Bits() <= l.prefix.Bits() && c.prefix.Contains(l.prefix.Addr()) {
			return fault("", fmt.Sprintf("%s lies in %s, which no range opens (%s)", l.prefix, c.prefix, c.reason), "name the exact addresses")
		}
	}
	return nil
}
