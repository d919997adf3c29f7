package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

// corners are the prefixes around which lines and flows are drawn, so that they meet often.
var corners = prefixes("10.0.0.0/8", "10.0.0.0/24", "10.0.0.4/30", "169.254.0.0/16", "169.254.169.254/32", "127.0.0.0/8", "198.18.0.0/16",
	"224.0.0.0/4", "0.0.0.0/0", "0.0.0.0/8", "8.8.8.0/24", "168.63.129.16/32", "255.255.255.255/32", "100.64.0.0/10",
	"::/0", "::/96", "fe80::/10", "fd00:ec2::/64", "2606:4700::/32", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::1/128",
	"ff00::/8", "::ffff:0:0:0/96", "fd63:756c:7665:7274::/96")

// drawAddr draws an address in one of the corners.
func drawAddr(t *rapid.T, label string) netip.Addr {
	p := rapid.SampledFrom(corners).Draw(t, label+" near")
	raw := p.Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		if rapid.IntRange(0, 3).Draw(t, label+" bit") == 0 {
			raw[i/8] |= 0x80 >> (i % 8)
		}
	}
	a, _ := netip.AddrFromSlice(raw)
	return a.Unmap()
}

func drawPrefix(t *rapid.T) netip.Prefix {
	switch rapid.IntRange(0, 2).Draw(t, "kind") {
	case 0:
		return rapid.SampledFrom(corners).Draw(t, "corner")
	case 1:
		a := drawAddr(t, "exact")
		return netip.PrefixFrom(a, a.BitLen())
	}
	a := drawAddr(t, "prefix")
	p, _ := a.Prefix(rapid.IntRange(0, a.BitLen()).Draw(t, "bits"))
	return p
}

func drawLine(t *rapid.T) string {
	ports := rapid.SampledFrom([]string{"*", "80", "80-90", "53,80"}).Draw(t, "ports")
	proto := rapid.SampledFrom([]string{"tcp", "udp", "tcp,udp", "icmp"}).Draw(t, "proto")
	target := "internet"
	if rapid.IntRange(0, 5).Draw(t, "target") > 0 {
		p := drawPrefix(t)
		target = p.String()
		if p.Addr().Is6() {
			target = "[" + target + "]"
		}
	}
	if proto == "icmp" {
		return proto + " " + target
	}
	return proto + " " + target + ":" + ports
}

func drawGrant(t *rapid.T, label string) *Grant {
	lines := []wire.Grant{}
	for i := range rapid.IntRange(0, 6).Draw(t, label) {
		g := wire.Grant{Rule: fmt.Sprint("r", i), Allow: drawLine(t)}
		if rapid.IntRange(0, 3).Draw(t, "observe") == 0 {
			g.Allow, g.Observe = "", drawPrefix(t).String()
			if _, err := parseObserve(g.Observe); err != nil {
				continue // it would never let anything through
			}
		}
		lines = append(lines, g)
	}
	g, err := ParseGrant(lines)
	if err != nil && !strings.Contains(err.Error(), "IPv6 dress") {
		t.Fatalf("%v: %v", lines, err)
	}
	return g
}

func drawScope(t *rapid.T) *Scope {
	own := drawAddr(t, "own")
	s := &Scope{
		Offered: drawGrant(t, "offered"), Own: func(a netip.Addr) bool { return a == own },
		Overlay: prefixes("198.18.0.0/16", "fd63:756c:7665:7274::/96"),
	}
	if rapid.Bool().Draw(t, "has its own policy") {
		s.Local = drawGrant(t, "local")
	}
	return s
}

func drawFlow(t *rapid.T) Flow {
	proto := rapid.SampledFrom([]Proto{TCP, UDP, ICMP}).Draw(t, "flow proto")
	port := rapid.SampledFrom([]uint16{53, 80, 85, 443}).Draw(t, "flow port")
	if proto == ICMP {
		port = 0
	}
	return Flow{proto, netip.AddrPortFrom(drawAddr(t, "flow"), port)}
}

// names tells, independently of Decide, whether a line of g is for this one address.
func (g *Grant) names(a netip.Addr) bool {
	return g != nil && len(g.byPrefix[netip.PrefixFrom(a, a.BitLen())]) > 0
}

func TestDecideNeverOpensClosedAddresses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, f := drawScope(t), drawFlow(t)
		if !s.Decide(f).Allowed {
			return
		}
		in := embedded(f.Dst.Addr())
		for _, a := range append([]netip.Addr{f.Dst.Addr()}, in.addrs[:in.n]...) {
			if contains(s.Overlay, a) {
				t.Fatalf("%v reaches the overlay", f)
			}
			if closedBy(a) != nil && !s.Offered.names(a) {
				t.Fatalf("%v is open without a line that names %s", f, a)
			}
			strict := s.Own(a) || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified()
			if strict && (!s.Offered.names(a) || !s.Local.names(a)) {
				t.Fatalf("%v is open although the gateway's own policy does not name %s", f, a)
			}
		}
	})
}

func TestDecideAllowsOnlyWhatBothPoliciesGive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, f := drawScope(t), drawFlow(t)
		if !s.Decide(f).Allowed {
			return
		}
		for name, g := range map[string]*Grant{"offered": s.Offered, "own": s.Local} {
			alone := &Scope{Offered: g, Local: g, Own: s.Own, Overlay: s.Overlay}
			if g != nil && !alone.Decide(f).Allowed {
				t.Fatalf("%v is allowed, but not by the %s policy", f, name)
			}
		}
	})
}

func TestRoutesHoldWhatDecideAllows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawScope(t)
		routes := s.Routes()
		checkSorted(t, routes)
		for range 8 {
			if f := drawFlow(t); s.Decide(f).Allowed && !contains(routes, f.Dst.Addr()) && (closedBy(f.Dst.Addr().Unmap()) == nil || routable(f.Dst.Addr().Unmap())) {
				t.Fatalf("%v is allowed, but no route of %v leads there", f, routes)
			}
		}
		for _, r := range routes {
			if slices.ContainsFunc(s.Overlay, r.Overlaps) {
				t.Fatalf("route %s overlaps the overlay", r)
			}
			for i := range closedRanges {
				if c := &closedRanges[i]; r.Overlaps(c.prefix) && !r.IsSingleIP() && !s.named(r) {
					t.Fatalf("route %s overlaps %s", r, c.prefix)
				}
			}
		}
	})
}

// named tells whether every address of a short route is named by some line: neighbours merge.
func (s *Scope) named(r netip.Prefix) bool {
	if r.Addr().BitLen()-r.Bits() > 4 {
		return false
	}
	for a := r.Addr(); r.Contains(a); a = a.Next() {
		if closedBy(a) != nil && !s.Offered.names(a) && !s.Local.names(a) {
			return false
		}
	}
	return true
}

func checkSorted(t interface{ Fatalf(string, ...any) }, routes []netip.Prefix) {
	for i := 1; i < len(routes); i++ {
		if a, b := routes[i-1], routes[i]; a.Overlaps(b) || a.Addr().Compare(b.Addr()) >= 0 {
			t.Fatalf("routes %s and %s are not disjoint and sorted", a, b)
		}
	}
	for _, r := range routes {
		if r != r.Masked() {
			t.Fatalf("route %s is not masked", r)
		}
	}
}

func drawRule(t *rapid.T, name string) Rule {
	r := Rule{Name: name, Match: map[string]Values{}, Allow: []string{"tcp 10.0.0.1:" + fmt.Sprint(rapid.IntRange(1, 9).Draw(t, "port"))}}
	r.Network = rapid.SampledFrom([]string{"", "corp", "lab"}).Draw(t, "network")
	r.Match["repository_owner"] = Values{rapid.SampledFrom([]string{"acme", "Acme", "other"}).Draw(t, "owner")}
	values := map[string][]string{
		"ref": {"refs/heads/*", "refs/heads/main", "**"}, "environment": {"production", "*"}, "event_name": {"push", "*", "workflow_run"},
	}
	for _, claim := range slices.Sorted(maps.Keys(values)) { // rapid wants the same draws in the same order
		if rapid.Bool().Draw(t, claim+"?") {
			r.Match[claim] = rapid.SliceOfN(rapid.SampledFrom(values[claim]), 1, 2).Draw(t, claim)
		}
	}
	return r
}

func drawRules(t *rapid.T) []Rule {
	var rules []Rule
	for i := range rapid.IntRange(0, 5).Draw(t, "rules") {
		rules = append(rules, drawRule(t, fmt.Sprint("rule", i)))
	}
	return rules
}

func drawClaims(t *rapid.T) claimSet {
	return github(
		"repository_owner", rapid.SampledFrom([]string{"acme", "ACME", "other", "-", ""}).Draw(t, "owner claim"),
		"ref", rapid.SampledFrom([]string{"refs/heads/main", "refs/heads/a/b", "refs/tags/v1", "-"}).Draw(t, "ref claim"),
		"environment", rapid.SampledFrom([]string{"production", "staging", "-", ""}).Draw(t, "environment claim"),
		"event_name", rapid.SampledFrom([]string{"push", "workflow_run", "pull_request_target", "-"}).Draw(t, "event claim"),
	)
}

// sortDecision makes decisions comparable without regard to the rules' order.
var sortDecision = cmp.Options{
	cmpopts.SortSlices(func(a, b string) bool { return a < b }),
	cmpopts.SortSlices(func(a, b wire.Grant) bool { return a.Allow < b.Allow }),
	cmpopts.IgnoreFields(wire.Grant{}, "Rule"), // the first rule that gives a line
	cmpopts.IgnoreFields(Decision{}, "Denial"), cmpopts.EquateEmpty(),
}

func TestEvaluateIsIndependentOfOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, c := drawRules(t), drawClaims(t)
		shuffled := rapid.Permutation(rules).Draw(t, "order")
		a, errA := Compile(rules, Options{})
		b, errB := Compile(shuffled, Options{})
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if diff := cmp.Diff(a.Evaluate(today, "corp", c), b.Evaluate(today, "corp", c), sortDecision); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestAddingARuleNeverRemoves(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, c := drawRules(t), drawClaims(t)
		fewer, err := Compile(rules, Options{})
		if err != nil {
			t.Fatal(err)
		}
		at := rapid.IntRange(0, len(rules)).Draw(t, "at")
		more, err := Compile(slices.Insert(slices.Clone(rules), at, drawRule(t, "added")), Options{})
		if err != nil {
			t.Fatal(err)
		}
		before, after := fewer.Evaluate(today, "corp", c), more.Evaluate(today, "corp", c)
		for _, g := range before.Grants {
			if !slices.ContainsFunc(after.Grants, func(h wire.Grant) bool { return h.Allow == g.Allow }) {
				t.Fatalf("%v is lost with another rule", g)
			}
		}
	})
}

func TestExplainAgreesWithEvaluate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, err := Compile(drawRules(t), Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := drawClaims(t)
		var matched []string
		for _, r := range p.Explain(today, "corp", c) {
			differs := slices.ContainsFunc(r.Claims, func(c ClaimResult) bool { return !c.Matched })
			if r.Matched == (differs || r.Skipped != "") {
				t.Fatalf("%+v contradicts itself", r)
			}
			if r.Matched {
				matched = append(matched, r.Rule)
			}
		}
		if d := p.Evaluate(today, "corp", c); !slices.Equal(d.Rules, matched) {
			t.Fatalf("explain says %v, evaluate %v", matched, d.Rules)
		}
	})
}
