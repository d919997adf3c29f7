package policy

import (
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

const (
	claimIssuer = "iss"
	claimEvent  = "event_name"
	claimOwner  = "repository_owner"
	claimRepo   = "repository"
	claimOwnID  = "repository_owner_id"
	claimRepoID = "repository_id"
)

// fold says how much of a claim compares without regard to case.
type fold uint8

const (
	foldNone fold = iota // exactly
	foldAll              // a name of GitHub's
	foldRepo             // OWNER/REPO/rest: the first two segments are names, the rest is a path and a ref
)

// known is one of the claims that GitHub documents.
type known struct {
	name string
	fold fold
	id   bool // a number: compared whole, no globs
}

// knownClaims are GitHub's claims in the order in which a denial names them: whose job it is, then which, then the rest.
// Source: GitHub Docs, "OpenID Connect reference", and the claims that its tokens were seen to carry.
//
// Owner, repository and account names are case-insensitive but case-preserving at GitHub. So are environments: GitHub
// resolves a job's `environment: Production` to an existing `production` and applies its protection rules, so no job
// gains anything by writing it differently.
var knownClaims = []known{
	{name: claimIssuer},
	{name: claimOwnID, id: true},
	{name: claimOwner, fold: foldAll},
	{name: claimRepoID, id: true},
	{name: claimRepo, fold: foldAll},
	{name: "repository_visibility"},
	{name: "enterprise_id", id: true},
	{name: "enterprise"},
	{name: claimEvent},
	{name: "ref"},
	{name: "ref_type"},
	{name: "ref_protected"},
	{name: "base_ref"},
	{name: "head_ref"},
	{name: "environment", fold: foldAll},
	{name: "environment_node_id"},
	{name: "workflow"},
	{name: "workflow_ref", fold: foldRepo},
	{name: "workflow_sha"},
	{name: "job_workflow_ref", fold: foldRepo},
	{name: "job_workflow_sha"},
	{name: "actor_id", id: true},
	{name: "actor", fold: foldAll},
	{name: "runner_environment"},
	{name: "sha"},
	{name: "sub"},
	{name: "run_id", id: true},
	{name: "run_number", id: true},
	{name: "run_attempt", id: true},
	{name: "check_run_id", id: true},
	{name: "exp"}, {name: "iat"}, {name: "nbf"}, {name: "aud"}, {name: "jti"},
}

// unmatchable are claims on which a rule cannot usefully match, and why.
var unmatchable = map[string]string{
	"exp": "is checked for every token",
	"iat": "is checked for every token",
	"nbf": "is checked for every token",
	"aud": "is checked for every token, against the coordinator's URL and the job's key",
	"jti": "differs in every token",
}

// lookup finds a claim and its rank; unknown claims compare exactly and rank after all known ones.
func lookup(name string) (known, int) {
	for i, k := range knownClaims {
		if k.name == name {
			return k, i
		}
	}
	return known{name: name}, len(knownClaims)
}

// customClaim begins the names of an organisation's custom properties; they are never taken for a misspelling.
const customClaim = "repo_property_"

// misspelt gives the known claim that an unknown name most likely means, or "".
func misspelt(name string) string {
	if _, rank := lookup(name); rank < len(knownClaims) || strings.HasPrefix(name, customClaim) {
		return ""
	}
	names := make([]string, len(knownClaims))
	for i, k := range knownClaims {
		names[i] = k.name
	}
	return yamlfile.Nearest(name, names)
}

// byRank sorts claim names as a denial goes through them.
func byRank(names []string) { slices.SortFunc(names, compareRank) }

func compareRank(a, b string) int {
	_, i := lookup(a)
	_, j := lookup(b)
	if i != j {
		return i - j
	}
	return strings.Compare(a, b)
}
