package session

import (
	"slices"
	"strings"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/claims"
)

// documented are the claims that GitHub's tokens carry (GitHub Docs, "OpenID Connect reference"), less the ones that say
// nothing about the job. A lease remembers them so that a changed policy can be held against running sessions.
var documented = []string{
	"iss", "sub", "aud", "actor", "actor_id", "base_ref", "check_run_id", "enterprise", "enterprise_id", "environment",
	"event_name", "head_ref", "job_workflow_ref", "job_workflow_sha", "ref", "ref_protected", "ref_type", "repository",
	"repository_id", "repository_owner", "repository_owner_id", "repository_visibility", "run_attempt", "run_id",
	"run_number", "runner_environment", "sha", "workflow", "workflow_ref", "workflow_sha",
}

// identity are the claims that stay the same for as long as one job runs. A claim counts where the first token had it.
var identity = []string{"iss", "repository_owner_id", "repository_id", "run_id", "run_attempt", "check_run_id"}

// remembered is a lease's memory of its claims; it answers policy like the token did.
type remembered map[string]string

// Get gives a claim by name, and whether the token carried it.
func (r remembered) Get(name string) (string, bool) {
	v, ok := r[name]
	return v, ok
}

// customProperty begins the claims that an organisation defines for its repositories.
const customProperty = "repo_property_"

// maxProperties bounds how many of them a lease remembers, beyond those that the rules in force match on.
const maxProperties = 16

// remember keeps the documented claims, custom properties and whatever else the rules in force match on.
func remember(c *claims.Claims, cfg *config.Config) map[string]string {
	out := make(map[string]string, len(documented))
	keep := func(name string) {
		if v, ok := c.Get(name); ok {
			out[name] = v
		}
	}
	for _, name := range documented {
		keep(name)
	}
	for _, name := range cfg.Policy.Claims() {
		keep(name)
	}
	properties := slices.DeleteFunc(c.Names(), func(name string) bool { return !strings.HasPrefix(name, customProperty) })
	slices.Sort(properties)
	for _, name := range properties[:min(len(properties), maxProperties)] {
		keep(name)
	}
	return out
}

// sameJob reports whether a fresh token comes from the job that the session began with. Tokens of issuers that know no
// runs are held to their subject instead. A session that was adopted from its gateway has no claims yet: any job fits, because
// the token's audience has proven the key.
func sameJob(first map[string]string, c *claims.Claims) bool {
	if len(first) == 0 {
		return true
	}
	names := identity
	if _, ok := first["run_id"]; !ok {
		names = []string{"iss", "sub"}
	}
	for _, name := range names {
		want, had := first[name]
		if got, has := c.Get(name); had && (!has || got != want) {
			return false
		}
	}
	return true
}
