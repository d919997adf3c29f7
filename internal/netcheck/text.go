package netcheck

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"unicode"
)

// WriteText writes the report as people read it.
func (r *Report) WriteText(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	row := func(name, text string) { fmt.Fprintf(t, "%s\t%s\n", name, text) }
	row("coordinator", r.Coordinator.text())
	if r.Coordinator.Next != "" {
		row("", "next: "+r.Coordinator.Next)
	}
	if r.Proxy != nil {
		row("proxy", r.Proxy.URL)
	} else {
		row("proxy", "none")
	}
	row("udp", r.UDP.text())
	row("nat", r.NAT.text(r.UDP.Works))
	row("ipv4", r.IPv4.text())
	row("ipv6", r.IPv6.text())
	if r.MTU != nil {
		row("path mtu", fmt.Sprintf("%d", r.MTU.Bytes))
	}
	for _, relay := range r.Relays {
		row("relay "+relay.Name, relay.text())
	}
	p := r.Tunnel.Paths
	row("gateways", fmt.Sprintf("public: %s, behind an easy NAT: %s, behind a hard one: %s", p.Public, p.Easy, p.Hard))
	for _, line := range r.Tunnel.Meaning {
		row("", line)
	}
	return t.Flush()
}

func (c *Coordinator) text() string {
	if !c.Reachable {
		return c.Error
	}
	text := fmt.Sprintf("%s, %.1f ms", c.URL, c.RTT)
	if c.TLS != nil {
		text += fmt.Sprintf(", %s, certificate from %s", c.TLS.Version, c.TLS.Issuer)
	}
	return text
}

func (u *UDP) text() string {
	answered := 0
	for _, s := range u.Servers {
		if s.Mapped != nil {
			answered++
		}
	}
	switch {
	case u.Works:
		return fmt.Sprintf("gets out, %d of %d servers answer", answered, len(u.Servers))
	case u.Error != "":
		return u.Error
	case len(u.Servers) == 0:
		return "not known: the coordinator names no STUN server"
	}
	return fmt.Sprintf("does not get out: none of %d servers answers", len(u.Servers))
}

func (n *NAT) text(udp bool) string {
	if !udp {
		return "not known without UDP"
	}
	var parts []string
	switch {
	case !n.Present:
		parts = append(parts, "none")
	case n.Mapping == "":
		parts = append(parts, "of an unknown kind")
	default:
		parts = append(parts, fmt.Sprintf("%s: mapping %s", n.Mapping, n.Depends))
	}
	if n.Filtering != "" {
		parts = append(parts, "filtering "+string(n.Filtering))
	}
	return strings.Join(parts, ", ")
}

func (f *Family) text() string {
	if len(f.Addresses) == 0 && f.Public == nil {
		return "none"
	}
	own := make([]string, len(f.Addresses))
	for i, a := range f.Addresses {
		own[i] = a.String()
	}
	text := strings.Join(own, ", ")
	switch {
	case f.Public == nil:
		return text
	case contains(f.Addresses, f.Public.Addr()):
		return text + " (public)"
	}
	return strings.TrimPrefix(fmt.Sprintf("%s, seen as %s", text, f.Public.Addr()), ", ")
}

func contains(list []netip.Addr, a netip.Addr) bool {
	for _, b := range list {
		if a == b {
			return true
		}
	}
	return false
}

func (r *Relay) text() string {
	var parts []string
	for _, way := range []struct {
		name string
		*Way
	}{{"udp", r.UDP}, {"websocket", r.WebSocket}} {
		switch {
		case way.Way == nil:
		case way.Works:
			parts = append(parts, fmt.Sprintf("%s %.1f ms", way.name, way.RTT))
		default:
			parts = append(parts, fmt.Sprintf("%s: %s", way.name, way.Error))
		}
	}
	return strings.Join(parts, ", ")
}

// Printable cuts what a coordinator named to what may stand in a line, and makes spaces of control characters: a job's log
// takes commands, and a terminal obeys escape sequences.
func Printable(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
