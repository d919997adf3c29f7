// Package policy decides what a job may reach: pure functions over verified claims.
//
// A [Document] is compiled to a [Policy], which turns claims into grants ([Policy.Evaluate]); a [Scope] holds every flow of the session against them
// ([Scope.Decide]). Nothing here does I/O, keeps time or has state that changes, so a verdict can be reproduced from a
// file and a token alone. Everything fails closed: a missing or empty claim, an unknown protocol, an address that does
// not parse, a pattern that would take too long.
//
// # Matching
//
// All keys of a rule's match have to match, and where it names groups, all keys of one entry of one of them as well; a list
// means any of its values. Values are globs, anchored at both ends: `*`
// is any run of characters but '/', `**` any run at all, and every other character, '?' and '|' included, stands for
// itself. There are no regular expressions. Upper and lower case of ASCII letters are equal where GitHub treats them so
// (repository, repository_owner, actor, environment, and the OWNER/REPO that workflow_ref and job_workflow_ref begin
// with); everything else, refs above all, compares exactly. Letters outside ASCII never fold.
//
// # Reaching
//
// Some destinations stay closed even inside a granted range; see [Scope.Decide].
package policy

import (
	"maps"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Claims is what policy asks of a verified token. Get gives a claim as text (numbers and booleans in their JSON form)
// and whether the token carries it at all.
type Claims interface {
	Get(name string) (string, bool)
}

// Document is what one file says about jobs.
type Document struct {
	// Targets are allow lines under a name, for rules to share.
	Targets map[string][]string `yaml:"targets,omitempty"`
	// Groups are sets of jobs under a name, for rules to share. A job belongs to a group if all keys of one of its entries
	// match.
	Groups map[string][]map[string]Values `yaml:"groups,omitempty"`
	// Rules say which jobs reach what.
	Rules []Rule `yaml:"rules,omitempty"`
}

// Rule is one rule as a file writes it. At least one of Groups and Match says whose jobs it is for, at least one of Targets,
// Allow and Observe what they reach.
type Rule struct {
	// Name is what denials, logs and the audit record call the rule.
	Name string `yaml:"name" jsonschema:"required"`
	// Network that the jobs get into; may be left out where there is one.
	Network string `yaml:"network,omitempty"`
	// Groups to one of which the job has to belong.
	Groups Values `yaml:"groups,omitempty"`
	// Match holds what the claims of the job's token have to be: all keys, any of a key's values.
	Match map[string]Values `yaml:"match,omitempty"`
	// Targets that the rule opens, by their names.
	Targets Values `yaml:"targets,omitempty"`
	// Allow holds lines such as "tcp db.internal:5432": protocols, a space, a target, a colon, ports.
	Allow []string `yaml:"allow,omitempty"`
	// Observe holds ranges that are let through on every protocol and port but marked in the record: to learn what a job
	// needs before its lines are written.
	Observe []string `yaml:"observe,omitempty"`
	// MaxSession bounds how long one session may last, such as 2h.
	MaxSession time.Duration `yaml:"max_session,omitempty"`
	// Expires is the rule's last day, in UTC; from the next on it matches no job.
	Expires Date `yaml:"expires,omitempty"`
	// Accept names warnings that were considered and are not to be given for this rule.
	Accept Values `yaml:"accept,omitempty"`
}

// Values is one value or a list of them; numbers are taken as their text.
type Values []string

// Source is a document and what tells it from others in an [Error].
type Source struct {
	File string
	Document
}

// Options say what holds for all rules of a policy.
type Options struct {
	// Issuers that may admit jobs, see [DefaultIssuer]. Empty means GitHub's public issuer.
	Issuers []string
	// IssuerNames are short names for issuers, usable where a match has an issuer's URL.
	IssuerNames map[string]string
	// Networks that exist; a rule for another one is refused. Nil skips the check (a gateway's own file).
	Networks []string
}

// DefaultIssuer gives the issuer whose tokens a rule is for that does not match on `iss` itself, because ids of different
// issuers collide: GitHub's public one if it is among them, else the only one. With several others there is none, and every
// rule has to name its own.
func DefaultIssuer(issuers []string) (string, bool) {
	switch {
	case len(issuers) == 0, slices.Contains(issuers, GitHub):
		return GitHub, true
	case len(issuers) == 1:
		return issuers[0], true
	}
	return "", false
}

// GitHub is the issuer that is meant where [Options] name none.
const GitHub = "https://token.actions.githubusercontent.com"

// DefaultMaxSession bounds a session for which no rule says otherwise: the longest job on a hosted runner.
const DefaultMaxSession = 6 * time.Hour

// Bounds of max_session: below, a duration without its unit is more likely than a wish; above, no runner keeps a job.
const (
	MinMaxSession = time.Second
	MaxMaxSession = 5 * 24 * time.Hour
)

// Bounds on a policy. [Compile] and [ParseGrant] refuse what is larger.
const (
	MaxRules   = 4096 // rules in all
	MaxLines   = 4096 // different allow lines in all, and lines in a session's grant
	MaxMatch   = 64   // keys in a rule's match
	MaxValues  = 4096 // values of one key
	MaxEntries = 1024 // entries of a group, and of all groups of a rule
	MaxPattern = 256  // bytes of one value
	MaxName    = 128  // bytes of a rule's, a network's, a target's, a group's or a claim's name
	MaxLine    = 1024 // bytes of an allow line
	MaxPorts   = 64   // ports and ranges in one allow line
	MaxClaim   = 1024 // bytes of a claim that a wildcard is held against; a longer one matches only literally
)

// Policy is a compiled set of rules, safe for concurrent use.
type Policy struct {
	rules  []rule
	index  index // by what tells most about a rule's jobs
	pinned index // by whom a rule pins, for denials
	lines  int   // different ones
	claims []string
}

// rule is one compiled rule.
type rule struct {
	name       string
	network    string // "" means every network
	ways       []way  // at least one
	grants     []wire.Grant
	lines      []int         // for each grant the number that it shares with the same line of other rules
	maxSession time.Duration // 0 where the rule does not say
	expires    time.Time     // from then on it matches nothing; zero: never

	source, index int // where it is written
}

// way is one of the ways to match a rule: its own match, together with one entry of one of its groups where it has any.
type way struct {
	group   string // "" where the rule has none
	issuers []string
	claims  []matcher // without iss, in the order in which a denial names them: identity first
	pin     pin
	events  [][]string // the values of event_name, for each time that it has to match
}

// Error is what is wrong with a document, and where: Source is its number among those that were compiled, Path a YAML path
// such as "$.rules[2].allow[0]".
type Error struct {
	Source  int
	Path    string
	Message string
	Next    string
}

// Error gives path, message and next step on one line.
func (e *Error) Error() string { return e.Path + ": " + e.Message + "; " + e.Next }

// Decision is what a policy says to a job.
type Decision struct {
	Allowed    bool
	Rules      []string      // names of the rules that matched, in file order
	Grants     []wire.Grant  // what they give, in file order; a line that several give stands once, with the first
	MaxSession time.Duration // the smallest of theirs; [DefaultMaxSession] where none says
	Until      time.Time     // when the first of them expires; zero: never
	// Denial is the closest rule and the first claim that differs. Only set when not allowed and the token's owner is
	// pinned by some rule: a stranger learns nothing.
	Denial *problem.Denial
}

// Evaluate decides at a time for a job that wants into network. An empty network of a rule in a gateway's own file matches
// every network.
//
// The closest rule of a denial is the one of which most claims match, the first in the file among equals, and only
// rules that pin the token's owner compete: where several owners share a coordinator, none sees another's rules.
func (p *Policy) Evaluate(now time.Time, network string, c Claims) Decision {
	var d decision
	for _, i := range p.index.candidates(c) {
		if r := &p.rules[i]; r.inForce(now, network) && r.matches(c) {
			d.add(p, r)
		}
	}
	if !d.Allowed {
		d.Denial = p.denial(now, network, c)
	} else if d.MaxSession == 0 {
		d.MaxSession = DefaultMaxSession
	}
	return d.Decision
}

// decision is one in the making.
type decision struct {
	Decision
	seen []uint64 // which lines it has, one bit each
}

func (d *decision) add(p *Policy, r *rule) {
	d.Allowed = true
	d.Rules = append(d.Rules, r.name)
	d.Grants = slices.Grow(d.Grants, len(r.grants))
	if d.seen == nil {
		d.seen = make([]uint64, (p.lines+63)/64)
	}
	for i, n := range r.lines {
		if bit := uint64(1) << (n % 64); d.seen[n/64]&bit == 0 {
			d.seen[n/64] |= bit
			d.Grants = append(d.Grants, r.grants[i])
		}
	}
	if r.maxSession > 0 && (d.MaxSession == 0 || r.maxSession < d.MaxSession) {
		d.MaxSession = r.maxSession
	}
	if !r.expires.IsZero() && (d.Until.IsZero() || r.expires.Before(d.Until)) {
		d.Until = r.expires
	}
}

// NextExpiry gives when the next rule expires after a time: from then on sessions may hold more than the policy gives.
func (p *Policy) NextExpiry(after time.Time) (at time.Time, ok bool) {
	for i := range p.rules {
		if e := p.rules[i].expires; e.After(after) && (!ok || e.Before(at)) {
			at, ok = e, true
		}
	}
	return at, ok
}

// Claims lists the claims that rules match on, sorted: whoever wants to hold a job against the policy later has to remember
// these. It is not to be changed.
func (p *Policy) Claims() []string { return p.claims }

// namesOfClaims collects them.
func (p *Policy) namesOfClaims() []string {
	all := map[string]bool{claimIssuer: true, claimEvent: true, claimRepo: true}
	for i := range p.rules {
		for j := range p.rules[i].ways {
			for k := range p.rules[i].ways[j].claims {
				all[p.rules[i].ways[j].claims[k].claim] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

func (r *rule) inForce(now time.Time, network string) bool {
	return (r.network == "" || r.network == network) && !r.expired(now)
}

func (r *rule) expired(now time.Time) bool { return !r.expires.IsZero() && !now.Before(r.expires) }

func (r *rule) matches(c Claims) bool {
	for i := range r.ways {
		if w := &r.ways[i]; w.appliesTo(c) && w.firstMismatch(c) < 0 {
			return true
		}
	}
	return false
}

// appliesTo tells whether the token's issuer is one of the rule's. A token without an issuer is nobody's.
func (w *way) appliesTo(c Claims) bool {
	iss, ok := c.Get(claimIssuer)
	return ok && iss != "" && slices.Contains(w.issuers, iss)
}

// firstMismatch gives the index of the first claim that does not match, len(w.claims) where only the event is one that
// has to be spelt out, and -1 where all match.
func (w *way) firstMismatch(c Claims) int {
	for i := range w.claims {
		if got, ok := c.Get(w.claims[i].claim); !ok || !w.claims[i].match(got) {
			return i
		}
	}
	if !w.mayTrigger(c) {
		return len(w.claims)
	}
	return -1
}
