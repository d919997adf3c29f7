package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Grant is a compiled set of allow lines, safe for concurrent use. The zero value grants nothing.
//
// Lines are found by their prefix: one map lookup for every prefix length that is in use, however many lines there are.
// Lines by name are found by the name and by each of the domains that it lies in.
type Grant struct {
	byPrefix map[netip.Prefix][]entry
	bits4    []int // prefix lengths in use
	bits6    []int
	internet []entry
	byName   map[hostName][]entry
	observed *Grant // what observe lines let through, by address alone; nil for none
}

// entry is one line as its prefix leads to it.
type entry struct {
	index  int // the line's place in the grant
	rule   string
	protos Proto
	ports  []portRange
}

// ParseGrant compiles allow lines that came over the wire, at most [MaxLines]. The error is a *problem.Error.
func ParseGrant(lines []wire.Grant) (*Grant, error) {
	const next = "run programs of one version on both sides, and check the coordinator's policy"
	if len(lines) > MaxLines {
		return nil, problem.New(problem.BadRequest, fmt.Sprintf("a grant of %d lines is more than the %d that are taken", len(lines), MaxLines), next)
	}
	g := &Grant{byPrefix: make(map[netip.Prefix][]entry, len(lines))}
	for i, in := range lines {
		if !printable(in.Rule) {
			return nil, problem.New(problem.BadRequest, fmt.Sprintf("a grant names the rule %.64q", in.Rule), next)
		}
		into, parse, text := g, parseLine, in.Allow
		if in.Observe != "" {
			if in.Allow != "" {
				return nil, problem.New(problem.BadRequest, "a grant both allows and observes", next)
			}
			into, parse, text = g.watch(), parseObserve, in.Observe
		}
		l, err := parse(text)
		if err != nil {
			return nil, problem.Wrap(err, problem.BadRequest, "a grant does not parse: "+err.Message, next)
		}
		into.add(l, entry{index: i, rule: in.Rule, protos: l.protos, ports: l.ports})
	}
	return g, nil
}

func (g *Grant) add(l line, e entry) {
	switch {
	case l.internet:
		g.internet = append(g.internet, e)
		return
	case l.host.name != "":
		if g.byName == nil {
			g.byName = make(map[hostName][]entry)
		}
		g.byName[l.host] = append(g.byName[l.host], e)
		return
	}
	g.byPrefix[l.prefix] = append(g.byPrefix[l.prefix], e)
	bits := &g.bits6
	if l.prefix.Addr().Is4() {
		bits = &g.bits4
	}
	if !slices.Contains(*bits, l.prefix.Bits()) {
		*bits = append(*bits, l.prefix.Bits())
	}
}

func (e *entry) covers(proto Proto, port uint16) bool {
	return e.protos&proto != 0 && (proto == ICMP || hasPort(e.ports, port))
}

// find gives the first line that covers a flow; exact asks for one that names the very address. A nil grant covers
// nothing.
func (g *Grant) find(proto Proto, addr netip.Addr, port uint16, exact bool) (rule string, ok bool) {
	if g == nil {
		return "", false
	}
	best := firstEntry(g.byPrefix[netip.PrefixFrom(addr, addr.BitLen())], nil, proto, port)
	if !exact {
		bits := g.bits6
		if addr.Is4() {
			bits = g.bits4
		}
		for _, n := range bits {
			if prefix, err := addr.Prefix(n); err == nil {
				best = firstEntry(g.byPrefix[prefix], best, proto, port)
			}
		}
		if len(g.internet) > 0 && isPublic(addr) {
			best = firstEntry(g.internet, best, proto, port)
		}
	}
	if best == nil {
		return "", false
	}
	return best.rule, true
}

// firstEntry gives the earlier of best and the first entry that covers a flow. Entries are in the order of the lines.
func firstEntry(entries []entry, best *entry, proto Proto, port uint16) *entry {
	for i := range entries {
		e := &entries[i]
		if best != nil && best.index < e.index {
			return best
		}
		if e.covers(proto, port) {
			return e
		}
	}
	return best
}

// findName gives the first line by name that covers a flow to a canonical name. A nil grant covers nothing.
func (g *Grant) findName(proto Proto, name string, port uint16) (rule string, ok bool) {
	if g == nil || len(g.byName) == 0 {
		return "", false
	}
	best := firstEntry(g.byName[hostName{name: name}], nil, proto, port)
	for rest, more := name, true; more; {
		if _, rest, more = strings.Cut(rest, "."); more {
			best = firstEntry(g.byName[hostName{name: rest, wild: true}], best, proto, port)
		}
	}
	if best == nil {
		return "", false
	}
	return best.rule, true
}

// hasAddresses tells whether any line is by address.
func (g *Grant) hasAddresses() bool {
	return len(g.byPrefix) > 0 || len(g.internet) > 0 || g.observed != nil
}

// meetsName tells whether a line by name stands for some name that h stands for too.
func (g *Grant) meetsName(h hostName) bool {
	for own := range g.byName {
		if own.covers(h) || h.covers(own) {
			return true
		}
	}
	return false
}
