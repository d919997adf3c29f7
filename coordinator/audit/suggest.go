package audit

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// Suggestion is the smallest list of allow lines that covers what jobs did in one network: no line grants a target, a protocol or
// a port that was not used, and no fewer lines would do.
type Suggestion struct {
	Network  string
	Lines    []SuggestedLine
	Flows    uint64    // that the lines cover
	Denied   []string  // what was tried and denied, and is not among the lines
	Failed   []string  // what was let through, but did not answer
	From     time.Time // of the first flow
	Until    time.Time
	Sessions int
	// Repositories are those of the jobs, where their sessions' leases were still known.
	Repositories []string
}

// SuggestedLine is one allow line.
type SuggestedLine struct {
	Allow string
	Flows uint64
	// New is what of it no allow line covered when it was used, in as many lines as that takes: Allow itself where nothing of it was.
	New []string
	// First and Last are the ends of a range, of which every address was used; invalid for a name and for a single address.
	First, Last netip.Addr
}

// use is one target with one protocol and port.
type use struct {
	target string // a name, or an address
	addr   netip.Addr
	proto  string
	port   uint16
}

type used struct {
	flows uint64
	new   bool // no allow line covered it: it was observed, or denied
}

// Suggester learns from records what was used.
type Suggester struct {
	Denied bool // count what was not granted as well, as if it were to be; what is closed whatever is granted stays out

	networks map[string]*learned
}

type learned struct {
	uses           map[use]*used
	denied, failed map[string]bool
	from, until    time.Time
	sessions       map[string]bool
	repositories   map[string]bool
	counted        map[string]bool // flows that are reported more than once
}

// Learn takes a line of the log; other records than flows teach nothing.
func (s *Suggester) Learn(line []byte) {
	var r struct {
		Session  Session  `json:"session"`
		Unmapped Unmapped `json:"unmapped"`
	}
	if json.Unmarshal(line, &r) != nil || len(r.Unmapped.Flows) == 0 {
		return
	}
	if s.networks == nil {
		s.networks = map[string]*learned{}
	}
	n := s.networks[r.Unmapped.Network]
	if n == nil {
		n = &learned{uses: map[use]*used{}, denied: map[string]bool{}, failed: map[string]bool{}, sessions: map[string]bool{}, repositories: map[string]bool{}, counted: map[string]bool{}}
		s.networks[r.Unmapped.Network] = n
	}
	n.sessions[r.Session.UID] = true
	if job := r.Unmapped.Job; job != nil && job.Repository != "" {
		n.repositories[job.Repository] = true
	}
	for _, f := range r.Unmapped.Flows {
		n.learn(f, r.Unmapped.Instance, s.Denied)
	}
}

// answered reports whether something was behind a flow that was let through.
func answered(c wire.FlowCause) bool {
	switch c {
	case wire.CauseRefused, wire.CauseUnreachable, wire.CauseTimeout, wire.CauseNoName:
		return false
	}
	return true
}

// grantable reports whether a flow was denied for want of a grant. Metadata, loopback and other jobs are no job's need: nobody should
// get a line for them by copying a list.
func grantable(f wire.FlowRecord) bool {
	return f.Reason == "" || strings.HasPrefix(f.Reason, policy.NotGranted)
}

func (n *learned) learn(f wire.FlowRecord, instance string, denied bool) {
	if n.from.IsZero() || f.Began.Before(n.from) {
		n.from = f.Began
	}
	if end := f.Began.Add(time.Duration(f.Lasted)); end.After(n.until) {
		n.until = end
	}
	u, ok := useOf(f)
	through := f.Verdict == wire.FlowAllowed || f.Verdict == wire.FlowObserved || f.Verdict == wire.FlowOverLimits
	switch {
	case !through && (!denied || !grantable(f)) || !ok:
		n.denied[describe(f)] = true
		return
	case through && !answered(f.Cause):
		n.failed[describe(f)] = true
		return
	}
	have := n.uses[u]
	if have == nil {
		have = &used{}
		n.uses[u] = have
	}
	have.new = have.new || f.Verdict == wire.FlowObserved || f.Verdict == wire.FlowRefused
	if id := fmt.Sprint(instance, " ", f.Flow); f.Flow == 0 || !n.counted[id] {
		n.counted[id] = f.Flow != 0
		have.flows += max(f.Count, 1)
	}
}

// useOf gives what a flow used; ok is false where that cannot be told: a name that was only asked for, or several ports at
// once.
func useOf(f wire.FlowRecord) (u use, ok bool) {
	u = use{target: strings.ToLower(f.Name), proto: f.Proto, port: f.Addr.Port()}
	if u.target == "" {
		u.addr = f.Addr.Addr().Unmap().WithZone("")
		u.target = u.addr.String()
	}
	switch f.Proto {
	case "tcp", "udp":
		return u, u.port != 0 && (f.Name != "" || u.addr.IsValid())
	case "icmp":
		u.port = 0
		return u, f.Name != "" || u.addr.IsValid()
	}
	return u, false
}

func describe(f wire.FlowRecord) string {
	target := f.Name
	if target == "" && f.Addr.IsValid() {
		addr := f.Addr.Addr().Unmap()
		target = bracketed(netip.PrefixFrom(addr, addr.BitLen()))
	}
	text := f.Proto + " " + target
	if p := f.Addr.Port(); p != 0 {
		text = f.Proto + " " + target + ":" + strconv.Itoa(int(p))
	}
	if why := cmp.Or(f.Reason, string(f.Cause)); why != "" {
		text += " (" + why + ")"
	}
	return clip(text, 200)
}

// Suggestions gives what was learned, a suggestion for each network.
func (s *Suggester) Suggestions() []Suggestion {
	var out []Suggestion
	for _, name := range slices.Sorted(maps.Keys(s.networks)) {
		n := s.networks[name]
		g := Suggestion{Network: name, From: n.from, Until: n.until, Sessions: len(n.sessions),
			Repositories: slices.Sorted(maps.Keys(n.repositories)), Denied: slices.Sorted(maps.Keys(n.denied)), Failed: slices.Sorted(maps.Keys(n.failed))}
		g.Lines = linesOf(n.uses)
		for _, l := range g.Lines {
			g.Flows += l.Flows
		}
		out = append(out, g)
	}
	return out
}

// target is one target and all that was used of it.
type target struct {
	prefix netip.Prefix // invalid for a name
	name   string
	ports  map[string][]uint16 // by protocol, sorted
	uses   map[use]*used
}

// linesOf makes the lines: targets that were used alike are joined into ranges where nothing else lies in those.
func linesOf(uses map[use]*used) []SuggestedLine {
	targets := map[string]*target{}
	for u, what := range uses {
		t := targets[u.target]
		if t == nil {
			t = &target{name: u.target, ports: map[string][]uint16{}, uses: map[use]*used{}}
			if u.addr.IsValid() {
				t.prefix = netip.PrefixFrom(u.addr, u.addr.BitLen())
			}
			targets[u.target] = t
		}
		t.ports[u.proto] = append(t.ports[u.proto], u.port)
		t.uses[u] = what
	}
	list := slices.Collect(maps.Values(targets))
	for _, t := range list {
		for _, p := range t.ports {
			slices.Sort(p)
		}
	}
	var out []SuggestedLine
	for _, t := range join(list) {
		out = append(out, t.lines()...)
	}
	slices.SortFunc(out, func(a, b SuggestedLine) int { return cmp.Compare(a.Allow, b.Allow) })
	return out
}

// shape says how a target was used: equal for targets that can share a line.
func (t *target) shape() string { return fmt.Sprint(t.ports) } // maps print in the order of their keys

// join replaces halves of a range that were used alike by the whole, as long as there are any.
func join(list []*target) []*target {
	byShape := map[string]map[netip.Prefix]*target{}
	var out []*target
	for _, t := range list {
		if !t.prefix.IsValid() || !joinable(t.prefix.Addr()) {
			out = append(out, t)
			continue
		}
		s := t.shape()
		if byShape[s] == nil {
			byShape[s] = map[netip.Prefix]*target{}
		}
		byShape[s][t.prefix] = t
	}
	for _, same := range byShape {
		for bits := 128; bits > 0; bits-- {
			for p, t := range maps.Clone(same) {
				if p.Bits() == bits {
					joinHalves(same, p, t)
				}
			}
		}
		out = slices.AppendSeq(out, maps.Values(same))
	}
	return out
}

func joinHalves(same map[netip.Prefix]*target, p netip.Prefix, t *target) {
	other := sibling(p)
	twin := same[other]
	if twin == nil || same[p] == nil {
		return
	}
	whole := netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
	delete(same, p)
	delete(same, other)
	uses := maps.Clone(t.uses)
	maps.Copy(uses, twin.uses)
	same[whole] = &target{prefix: whole, ports: t.ports, uses: uses}
}

// sibling is the other half of the range that p is a half of.
func sibling(p netip.Prefix) netip.Prefix {
	b := p.Addr().AsSlice()
	bit := p.Bits() - 1
	b[bit/8] ^= 0x80 >> (bit % 8)
	addr, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(addr, p.Bits())
}

// joinable reports whether a range opens an address as its own line does: some are opened by their exact line alone.
func joinable(a netip.Addr) bool {
	line := []wire.Grant{{Rule: "r", Allow: "tcp " + bracketed(netip.PrefixFrom(a, a.BitLen()-1).Masked()) + ":1"}}
	g, err := policy.ParseGrant(line)
	if err != nil {
		return false
	}
	s := policy.Scope{Offered: g}
	return s.Decide(policy.Flow{Proto: policy.TCP, Dst: netip.AddrPortFrom(a, 1)}).Allowed
}

// bracketed is a range as a line writes it.
func bracketed(p netip.Prefix) string {
	text := p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	}
	if p.Addr().Is6() {
		text = "[" + text + "]"
	}
	return text
}

// lines gives a target's lines: one for ICMP, one for TCP and UDP where their ports are the same, else one for each.
func (t *target) lines() []SuggestedLine {
	var out []SuggestedLine
	tcp, udp := t.ports["tcp"], t.ports["udp"]
	both := len(tcp) > 0 && slices.Equal(tcp, udp)
	for _, p := range []struct {
		protos string
		ports  []uint16
		skip   bool
	}{{"tcp,udp", tcp, !both}, {"tcp", tcp, both}, {"udp", udp, both}} {
		if p.skip || len(p.ports) == 0 {
			continue
		}
		for _, ports := range portLists(p.ports) {
			out = append(out, t.line(p.protos, ports))
		}
	}
	if len(t.ports["icmp"]) > 0 {
		out = append(out, t.line("icmp", nil))
	}
	return out
}

// line makes one line for some of a target's ports, all of one kind, sorted.
func (t *target) line(protos string, ports []uint16) SuggestedLine {
	name := t.name
	if t.prefix.IsValid() {
		name = bracketed(t.prefix)
	}
	l := SuggestedLine{Allow: protos + " " + name}
	if ports != nil {
		l.Allow += ":" + strings.Join(ranges(ports), ",")
	}
	if t.prefix.IsValid() && !t.prefix.IsSingleIP() {
		l.First, l.Last = t.prefix.Addr(), last(t.prefix)
	}
	unknown, all := map[use]*used{}, true
	for u, what := range t.uses {
		if _, in := slices.BinarySearch(ports, u.port); !slices.Contains(strings.Split(protos, ","), u.proto) || ports != nil && !in {
			continue
		}
		if l.Flows += what.flows; what.new {
			unknown[u] = &used{}
		} else {
			all = false
		}
	}
	if all {
		l.New = []string{l.Allow}
		return l
	}
	for _, one := range linesOf(unknown) { // none of which has anything new in it
		l.New = append(l.New, one.Allow)
	}
	return l
}

// last is the last address of a range.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// portLists divides sorted ports into lists that a line can hold.
func portLists(ports []uint16) (out [][]uint16) {
	for items := range slices.Chunk(spans(ports), policy.MaxPorts) {
		n := 0
		for _, s := range items {
			n += int(s[1]-s[0]) + 1
		}
		out = append(out, ports[:n])
		ports = ports[n:]
	}
	return out
}

// spans gives the first and last ports of neighbours.
func spans(ports []uint16) (out [][2]uint16) {
	for i, p := range ports {
		if i > 0 && p == ports[i-1]+1 {
			out[len(out)-1][1] = p
		} else {
			out = append(out, [2]uint16{p, p})
		}
	}
	return out
}

// ranges writes sorted ports, neighbours together.
func ranges(ports []uint16) (out []string) {
	for _, s := range spans(ports) {
		text := strconv.Itoa(int(s[0]))
		if s[1] > s[0] {
			text += "-" + strconv.Itoa(int(s[1]))
		}
		out = append(out, text)
	}
	return out
}

// maxExplained bounds what is listed of denied and failed flows, and maxNew what is listed of one line.
const (
	maxExplained = 20
	maxNew       = 4
)

// Write writes a suggestion as YAML, to be put into a rule.
func (g *Suggestion) Write(w io.Writer) error {
	b := &strings.Builder{}
	fmt.Fprintf(b, "# network %s: what %s did in %d flows, %s to %s\n", g.Network, count(g.Sessions, "session"), g.Flows, stamp(g.From), stamp(g.Until))
	if n := len(g.Repositories); n > 1 {
		fmt.Fprintf(b, "# these are jobs of %d repositories, each of which would get what all of them need; --repository takes one: %s\n",
			n, printable(listed(g.Repositories)))
	}
	if len(g.Lines) == 0 {
		b.WriteString("allow: []\n")
	} else {
		b.WriteString("allow:\n")
	}
	for _, l := range g.Lines {
		fmt.Fprintf(b, "  - %q", l.Allow)
		if why := l.why(); why != "" {
			b.WriteString(" # " + why)
		}
		b.WriteByte('\n')
	}
	explain(b, "denied, and not in the list", g.Denied)
	explain(b, "let through, but nothing answered", g.Failed)
	_, err := io.WriteString(w, b.String())
	return err
}

// why says what is not plain from the line itself: that it stands for several addresses, and what of it is not allowed yet.
func (l *SuggestedLine) why() string {
	var parts []string
	if l.First.IsValid() {
		parts = append(parts, fmt.Sprintf("%v to %v, of which each was used", l.First, l.Last))
	}
	switch {
	case slices.Equal(l.New, []string{l.Allow}):
		parts = append(parts, "not allowed yet")
	case len(l.New) > 0:
		parts = append(parts, "of it not allowed yet: "+listed(l.New))
	}
	return strings.Join(parts, "; ")
}

// listed names some.
func listed(list []string) string {
	if more := len(list) - maxNew; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:maxNew], ", "), more)
	}
	return strings.Join(list, ", ")
}

func explain(b *strings.Builder, what string, list []string) {
	for i, text := range list {
		if i == maxExplained {
			fmt.Fprintf(b, "# and %d more\n", len(list)-i)
			break
		}
		fmt.Fprintf(b, "# %s: %s\n", what, printable(text))
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// printable keeps what a gateway wrote on its line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
