package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Warn says something about a place in one of the compiled sources.
type Warn struct {
	Source  int
	Path    string
	Code    Code
	Message string
	Next    string
}

// Lint tells what is dangerous or useless in sources that compile to p. It errs on the side of telling: a rule that was
// considered can accept a warning.
func Lint(p *Policy, sources []Source, now time.Time) []Warn {
	l := &linter{policy: p, sources: sources, now: now}
	shadows := p.shadows(now)
	for i := range p.rules {
		l.rule(&p.rules[i], shadows[i])
	}
	for i := range sources {
		l.unused(i)
	}
	return l.out
}

type linter struct {
	policy  *Policy
	sources []Source
	now     time.Time
	out     []Warn
}

// ruleLint looks at one rule.
type ruleLint struct {
	*linter
	in       *Rule
	r        *rule
	path     string
	accepted map[Code]bool
}

// rule says everything about one rule; shadow is the rule that makes it needless, nil where there is none.
func (l *linter) rule(r *rule, shadow *shadow) {
	x := &ruleLint{
		linter: l, in: &l.sources[r.source].Rules[r.index], r: r,
		path: fmt.Sprintf("$.rules[%d]", r.index), accepted: map[Code]bool{},
	}
	if x.expiry() && x.possible() {
		x.identity()
		x.refs()
		x.pullRequests()
		x.runner()
		x.claims()
		x.lines()
		x.needless(shadow)
	}
	for i, code := range x.in.Accept {
		if !x.accepted[Code(code)] && Code(code) != NothingToAccept {
			x.warn(NothingToAccept, item(x.path+".accept", i, len(x.in.Accept)), fmt.Sprintf("rule %q accepts %s, of which there is nothing to say", r.name, code),
				"take it out, so that it is said when it comes true")
		}
	}
}

// warn notes something about the rule, unless it accepts it.
func (x *ruleLint) warn(code Code, path, message, next string) {
	if slices.Contains(x.in.Accept, string(code)) {
		x.accepted[code] = true
		return
	}
	x.out = append(x.out, Warn{Source: x.r.source, Path: path, Code: code, Message: message, Next: next})
}

// at is the path of a claim in the rule's own match, or of its groups where the claim stands there.
func (x *ruleLint) at(claims ...string) string {
	for _, claim := range claims {
		if _, ok := x.in.Match[claim]; ok {
			return x.path + ".match" + yamlfile.Key(claim)
		}
	}
	if len(x.in.Groups) > 0 {
		return x.path + ".groups"
	}
	return x.path + ".match"
}

// every tells whether all ways to match have a property.
func (x *ruleLint) every(f func(*way) bool) bool {
	for i := range x.r.ways {
		if !f(&x.r.ways[i]) {
			return false
		}
	}
	return true
}

func (x *ruleLint) some(f func(*way) bool) bool {
	return !x.every(func(w *way) bool { return !f(w) })
}

// on gives the matchers of a way on some claims.
func (w *way) on(claims ...string) []*matcher {
	var out []*matcher
	for i := range w.claims {
		if slices.Contains(claims, w.claims[i].claim) {
			out = append(out, &w.claims[i])
		}
	}
	return out
}

func (w *way) has(claims ...string) bool { return len(w.on(claims...)) > 0 }

// expiry is false for a rule that is of no more concern.
func (x *ruleLint) expiry() bool {
	left := x.r.expires.Sub(x.now)
	switch {
	case x.r.expires.IsZero():
	case left <= 0:
		x.warn(Expired, x.path+".expires", fmt.Sprintf("rule %q expired: its last day was %s", x.r.name, x.in.Expires), "remove the rule, or give it a new date")
		return false
	case left < expiresSoonDays*24*time.Hour:
		x.warn(ExpiresSoon, x.path+".expires", fmt.Sprintf("rule %q expires soon: its last day is %s", x.r.name, x.in.Expires), "give it a new date if it is still needed")
	}
	return true
}

// possible is false for a rule that no token can match.
func (x *ruleLint) possible() bool {
	var why string
	if !x.every(func(w *way) bool {
		why = w.contradiction()
		return why != ""
	}) {
		return true
	}
	x.warn(NeverMatches, x.path, fmt.Sprintf("rule %q never matches: %s", x.r.name, why), "correct its match: a rule that does nothing gets widened until it does too much")
	return false
}

func (x *ruleLint) identity() {
	if x.some(func(w *way) bool { return !w.has(claimOwnID, claimRepoID) }) {
		x.warn(NamesWithoutIDs, x.at(claimRepo, claimOwner), fmt.Sprintf("rule %q knows its jobs by names alone, and a name can be taken by somebody else once it is given up", x.r.name),
			"add repository_owner_id: gh api users/OWNER --jq .id")
	}
	for _, claim := range []string{claimRepo, "workflow_ref", "job_workflow_ref"} {
		if x.some(func(w *way) bool { return w.crosses(claim) }) {
			x.warn(CrossesOwners, x.at(claim), fmt.Sprintf("rule %q has a wildcard for the owner in %s, so another owner's repository fits", x.r.name, claim),
				"spell the owner out: OWNER/…")
		}
	}
	if x.some(func(w *way) bool { return w.has("sub") }) {
		x.warn(FragileSub, x.at("sub"), fmt.Sprintf("rule %q matches on sub, which has two formats and can be re-templated by an administrator", x.r.name),
			"match on repository_id, ref and environment instead")
	}
}

// crosses tells whether a pattern on a claim that begins with an owner has a wildcard there, though more than one owner is
// possible.
func (w *way) crosses(claim string) bool {
	if claim != "job_workflow_ref" && len(w.pin.who.values) == 1 {
		return false // the caller's own repository, whose owner is pinned
	}
	for _, m := range w.on(claim) {
		for _, v := range m.values {
			if owner, _, _ := strings.Cut(v, "/"); strings.Contains(owner, "*") {
				return true
			}
		}
	}
	return false
}

func (x *ruleLint) runner() {
	if x.some(func(w *way) bool { return !w.has("runner_environment") }) {
		x.warn(RunnerMissing, x.at("runner_environment"), fmt.Sprintf("rule %q also admits jobs on self-hosted runners", x.r.name),
			"add runner_environment: github-hosted, or self-hosted where they are meant")
	}
}

func (x *ruleLint) claims() {
	for claim, why := range map[string]string{
		"workflow": "is free text in any workflow file; match on workflow_ref",
		"head_ref": "is chosen by whoever opens the pull request; match on ref and event_name",
	} {
		if x.some(func(w *way) bool { return w.has(claim) }) {
			x.warn(UserControlled, x.at(claim), fmt.Sprintf("rule %q relies on %s, which its author chooses freely", x.r.name, claim), claim+" "+why)
		}
	}
	var unknown []string
	x.every(func(w *way) bool {
		for i := range w.claims {
			name := w.claims[i].claim
			if _, rank := lookup(name); rank == len(knownClaims) && !strings.HasPrefix(name, customClaim) && slices.Contains(w.issuers, GitHub) {
				unknown = append(unknown, name)
			}
		}
		return true
	})
	slices.Sort(unknown)
	for _, name := range slices.Compact(unknown) {
		x.warn(UnknownClaim, x.at(name), fmt.Sprintf("rule %q matches on %q, which is no claim that GitHub documents", x.r.name, name), "check the name; without the claim no job matches")
	}
}

func (x *ruleLint) needless(s *shadow) {
	switch {
	case s == nil:
	case s.same:
		x.warn(Duplicate, x.path, fmt.Sprintf("rule %q says the same as rule %q", x.r.name, s.by.name), "keep one of them")
	default:
		x.warn(Shadowed, x.path, fmt.Sprintf("rule %q adds nothing: rule %q gives as much to all of its jobs", x.r.name, s.by.name), "remove it, or narrow the other")
	}
}

// unused tells of targets and groups of one file that no rule names.
func (l *linter) unused(source int) {
	targets, groups := map[string]bool{}, map[string]bool{}
	for _, s := range l.sources {
		for i := range s.Rules {
			for _, name := range s.Rules[i].Targets {
				targets[name] = true
			}
			for _, name := range s.Rules[i].Groups {
				groups[name] = true
			}
		}
	}
	doc := &l.sources[source].Document
	for _, name := range slices.Sorted(maps.Keys(doc.Targets)) {
		if !targets[name] {
			l.out = append(l.out, Warn{source, "$.targets" + yamlfile.Key(name), UnusedTarget, fmt.Sprintf("no rule names the target %q", name), "remove it, or name it in a rule"})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(doc.Groups)) {
		if !groups[name] {
			l.out = append(l.out, Warn{source, "$.groups" + yamlfile.Key(name), UnusedGroup, fmt.Sprintf("no rule names the group %q", name), "remove it, or name it in a rule"})
		}
	}
}

// Serves tells whether any rule is for tokens of an issuer.
func (p *Policy) Serves(issuer string) bool {
	for i := range p.rules {
		if slices.Contains(p.rules[i].issuers(), issuer) {
			return true
		}
	}
	return false
}
