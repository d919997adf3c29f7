package policy

import (
	"fmt"
	"net/netip"
	"strings"
)

// parseObserve reads a target under observe: an address, a CIDR or "internet", without protocols and ports. What lies
// there is let through on every protocol and port and marked, but nothing that only an exact line opens.
func parseObserve(text string) (line, *Error) {
	text = strings.TrimSpace(text)
	l := line{protos: TCP | UDP | ICMP, internet: text == "internet", ports: []portRange{{1, 65535}}}
	switch {
	case len(text) > MaxLine:
		return line{}, fault("", fmt.Sprintf("an observe line is longer than %d bytes", MaxLine), "split it")
	case l.internet:
		return l, nil
	case strings.ContainsAny(text, " \t"):
		return line{}, fault("", fmt.Sprintf("%q is no range to observe", text), "write a CIDR alone, such as 10.20.0.0/16: every protocol and port is observed")
	}
	target := strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	if isName(target) {
		return line{}, fault("", fmt.Sprintf("%q is a name, and observe takes ranges of addresses", text),
			"write the CIDR that holds the host, such as 10.20.0.0/16")
	}
	var err *Error
	if l.prefix, err = parseTarget(target); err != nil {
		return line{}, err
	}
	if c := closedBy(l.prefix.Addr()); c != nil && c.prefix.Bits() <= l.prefix.Bits() {
		return line{}, fault("", fmt.Sprintf("%s lies in %s, which observe never opens (%s)", l.prefix, c.prefix, c.reason),
			"allow the exact address, if it is meant")
	}
	return l, nil
}

// checkObserve checks the ranges that a rule observes.
func (c *compiler) checkObserve(lines []string, path string) {
	if len(lines) > MaxLines {
		c.fail(path, fmt.Sprintf("more than %d lines", MaxLines), "join ranges")
		return
	}
	for i, text := range lines {
		if _, err := parseObserve(text); err != nil {
			c.failed(err, fmt.Sprintf("%s[%d]", path, i))
		}
	}
}

// watch gives the grant that holds a grant's observed ranges.
func (g *Grant) watch() *Grant {
	if g.observed == nil {
		g.observed = &Grant{byPrefix: map[netip.Prefix][]entry{}}
	}
	return g.observed
}

// look is find, and where no allow line covers a flow, what is observed. A nil grant covers nothing.
func (g *Grant) look(proto Proto, addr netip.Addr, port uint16, exact bool) (rule string, observed, ok bool) {
	if rule, ok = g.find(proto, addr, port, exact); ok || g == nil || exact {
		return rule, false, ok
	}
	rule, ok = g.observed.find(proto, addr, port, false)
	return rule, ok, ok
}
