// Package policy decides what a job may reach: pure functions over verified claims.
//
// A [Policy] turns claims into grants ([Policy.Evaluate]); a [Scope] holds every flow of the session against them
// ([Scope.Decide]). Nothing here does I/O, keeps time or has state that changes, so a verdict can be reproduced from a
// file and a token alone. Everything fails closed: a missing or empty claim, an unknown protocol, an address that does
// not parse, a pattern that would take too long.
//
// # Matching
//
// All keys of a rule's match have to match; a list means any of its values. Values are globs, anchored at both ends: `*`
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
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Claims is what policy asks of a verified token. Get gives a claim as text (numbers and booleans in their JSON form)
// and whether the token carries it at all.
type Claims interface {
	Get(name string) (string, bool)
}

// Rule is one rule as a file writes it.
type Rule struct {
	Name       string            `yaml:"name"`
	Network    string            `yaml:"network,omitempty"`
	Match      map[string]Values `yaml:"match"`
	Allow      []string          `yaml:"allow"`
	Observe    []string          `yaml:"observe,omitempty"` // ranges that are let through though no allow names them
	MaxSession time.Duration     `yaml:"max_session,omitempty"`
}

// Values is one value or a list of them; numbers are taken as their text.
type Values []string

// Options say what holds for all rules of a file.
type Options struct {
	// Issuers that may admit jobs. A rule that does not match on `iss` itself applies to tokens of the first alone,
	// because ids of different issuers collide. Empty means GitHub's public issuer.
	Issuers []string
	// Networks that exist; a rule for another one is refused. Nil skips the check (a gateway's own file).
	Networks []string
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
	MaxRules   = 1024 // rules in a file
	MaxLines   = 4096 // allow lines in a file, and in a session's grant
	MaxMatch   = 64   // keys in a rule's match
	MaxValues  = 256  // values of one key
	MaxPattern = 256  // bytes of one value
	MaxName    = 128  // bytes of a rule's, a network's or a claim's name
	MaxLine    = 1024 // bytes of an allow line
	MaxPorts   = 64   // ports and ranges in one allow line
	MaxClaim   = 1024 // bytes of a claim that a wildcard is held against; a longer one matches only literally
)

// Policy is a compiled set of rules, safe for concurrent use.
type Policy struct {
	rules []rule
}

// rule is one compiled rule. Its claims are in the order in which a denial names them: identity first.
type rule struct {
	name       string
	network    string // "" means every network
	issuers    []string
	claims     []matcher // without iss
	pin        pin
	events     []string // the values of event_name that are spelt out
	grants     []wire.Grant
	maxSession time.Duration // 0 where the rule does not say
}

// Error is what is wrong with a rule, and where: Path is a YAML path such as "$.rules[2].allow[0]".
type Error struct {
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
	Grants     []wire.Grant  // what they give, in file order
	MaxSession time.Duration // the smallest of theirs; [DefaultMaxSession] where none says
	// Denial is the closest rule and the first claim that differs. Only set when not allowed and the token's owner is
	// pinned by some rule: a stranger learns nothing.
	Denial *problem.Denial
}

// Evaluate decides for a job that wants into network. An empty network of a rule in a gateway's own file matches every
// network.
//
// The closest rule of a denial is the one of which most claims match, the first in the file among equals, and only
// rules that pin the token's owner compete: where several owners share a coordinator, none sees another's rules.
func (p *Policy) Evaluate(network string, c Claims) Decision {
	d := Decision{}
	closest := nearest{}
	for i := range p.rules {
		r := &p.rules[i]
		if !r.concerns(network) || !r.appliesTo(c) {
			continue
		}
		if n := r.firstMismatch(c); n >= 0 {
			closest.consider(r, n, c)
			continue
		}
		d.grant(r)
	}
	if !d.Allowed {
		d.Denial = closest.denial(c)
		return d
	}
	if d.MaxSession == 0 {
		d.MaxSession = DefaultMaxSession
	}
	return d
}

func (d *Decision) grant(r *rule) {
	d.Allowed = true
	d.Rules = append(d.Rules, r.name)
	d.Grants = append(d.Grants, r.grants...)
	if r.maxSession > 0 && (d.MaxSession == 0 || r.maxSession < d.MaxSession) {
		d.MaxSession = r.maxSession
	}
}

func (r *rule) concerns(network string) bool { return r.network == "" || r.network == network }

// appliesTo tells whether the token's issuer is one of the rule's. A token without an issuer is nobody's.
func (r *rule) appliesTo(c Claims) bool {
	iss, ok := c.Get("iss")
	if !ok || iss == "" {
		return false
	}
	for _, want := range r.issuers {
		if iss == want {
			return true
		}
	}
	return false
}

// firstMismatch gives the index of the first claim that does not match, len(r.claims) where only the event is one that
// has to be spelt out, and -1 where the rule matches.
func (r *rule) firstMismatch(c Claims) int {
	for i := range r.claims {
		if got, ok := c.Get(r.claims[i].claim); !ok || !r.claims[i].match(got) {
			return i
		}
	}
	if !r.mayTrigger(c) {
		return len(r.claims)
	}
	return -1
}
