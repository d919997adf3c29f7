package policy

import (
	"maps"
	"slices"
)

// Code names one kind of warning. Codes are part of the configuration's format: they are added to, never renamed.
type Code string

// The warnings. A rule that was considered names those that are not to be given for it under accept.
const (
	NamesWithoutIDs     Code = "names-without-ids"
	CrossesOwners       Code = "crosses-owners"
	RefMissing          Code = "ref-missing"
	RefWide             Code = "ref-wide"
	StrangerInput       Code = "stranger-input"
	PullRequestWrites   Code = "pull-request-writes"
	RunnerMissing       Code = "runner-environment-missing"
	NeverMatches        Code = "never-matches"
	Expired             Code = "expired"
	ExpiresSoon         Code = "expires-soon"
	Duplicate           Code = "duplicate"
	Shadowed            Code = "shadowed"
	FragileSub          Code = "fragile-sub"
	UserControlled      Code = "user-controlled"
	UnknownClaim        Code = "unknown-claim"
	WideTarget          Code = "wide-target"
	PublicWildcard      Code = "public-wildcard"
	UnusedTarget        Code = "unused-target"
	UnusedGroup         Code = "unused-group"
	UnusedIssuer        Code = "unused-issuer"
	FileMissing         Code = "file-missing"
	NothingToAccept     Code = "nothing-to-accept"
	Observes            Code = "observes"
	expiresSoonDays          = 14
	wideBits4, wideAny4      = 8, 16 // prefixes this short are wide: on any port, on all ports
	wideBits6, wideAny6      = 32, 48
)

// warnings say what each is about, for the guide and for `check`.
var warnings = map[Code]string{
	NamesWithoutIDs:   "the rule knows its jobs by names alone, and names are recycled after a deletion",
	CrossesOwners:     "a wildcard stands where an owner's name stands, so another owner's repository fits",
	RefMissing:        "a rule that deploys is open to every branch and tag",
	RefWide:           "a rule that deploys names refs that anybody with write access can make",
	StrangerInput:     "the event runs with the base repository's rights on a stranger's input",
	PullRequestWrites: "pull requests reach something that can be written to",
	RunnerMissing:     "the rule also admits self-hosted runners, which may be shared, long-lived or somebody's own",
	NeverMatches:      "no token can match the rule",
	Expired:           "the rule's last day has passed",
	ExpiresSoon:       "the rule's last day is near",
	Duplicate:         "another rule says the same",
	Shadowed:          "the rule gives nothing that another does not give to the same jobs",
	FragileSub:        "the rule matches on sub, which has two formats and can be re-templated",
	UserControlled:    "the rule relies on a claim that whoever starts the job chooses freely",
	UnknownClaim:      "the claim is none that GitHub documents",
	WideTarget:        "the rule opens a very large range",
	PublicWildcard:    "a wildcard stands below a domain in which anybody can register names",
	UnusedTarget:      "no rule names the target",
	UnusedGroup:       "no rule names the group",
	UnusedIssuer:      "no rule is for the issuer's tokens",
	FileMissing:       "a file that the configuration names cannot be read from here, by this user",
	NothingToAccept:   "the rule accepts a warning that it would not get",
	Observes:          "the rule lets more through than it allows",
}

// Codes lists all warnings, sorted, and what each is about.
func Codes() map[Code]string { return maps.Clone(warnings) }

func codes() []string {
	var all []string
	for _, c := range slices.Sorted(maps.Keys(warnings)) {
		all = append(all, string(c))
	}
	return all
}
