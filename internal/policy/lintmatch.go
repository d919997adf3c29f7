package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// closedValues are claims that have one of few values.
var closedValues = map[string][]string{
	"ref_type":              {"branch", "tag"},
	"ref_protected":         {"true", "false"},
	"repository_visibility": {"public", "private", "internal"},
	"runner_environment":    {"github-hosted", "self-hosted"},
	claimEvent:              events,
}

// events are what starts a workflow. Source: GitHub Docs, "Events that trigger workflows", and the two under which a
// workflow is called or started by hand.
var events = []string{
	"branch_protection_rule", "check_run", "check_suite", "create", "delete", "deployment", "deployment_status", "discussion",
	"discussion_comment", "dynamic", "fork", "gollum", "image_version", "issue_comment", "issues", "label", "merge_group", "milestone",
	"page_build", "project", "project_card", "project_column", "public", "pull_request", "pull_request_comment", "pull_request_review",
	"pull_request_review_comment", "pull_request_target", "push", "registry_package", "release", "repository_dispatch", "schedule",
	"status", "watch", "workflow_call", "workflow_dispatch", "workflow_run",
}

// onPull are the events whose ref is that of a pull request, refs/pull/N/merge, and which alone carry base_ref and head_ref.
var onPull = []string{"pull_request", "pull_request_review", "pull_request_review_comment"}

// contradiction says why no token can match, "" where one may.
func (w *way) contradiction() string {
	for i := range w.claims {
		if why := w.claims[i].impossible(); why != "" {
			return why
		}
		for j := range i {
			if a, b := &w.claims[i], &w.claims[j]; a.claim == b.claim && a.disjoint(b) {
				return fmt.Sprintf("%s has to be one of %s and one of %s", a.claim, quoted(b.values), quoted(a.values))
			}
		}
	}
	for _, check := range []func() string{w.twoOwners, w.twoRepositories, w.refOfType, w.refOfEvent, w.refsOfEvent} {
		if why := check(); why != "" {
			return why
		}
	}
	return ""
}

// impossible says why no value of the claim can match.
func (m *matcher) impossible() string {
	if values, ok := closedValues[m.claim]; ok && !slices.ContainsFunc(values, m.match) {
		why := fmt.Sprintf("%s is never %s", m.claim, quoted(m.values))
		if near := yamlfile.Nearest(m.values[0], values); near != "" {
			why += fmt.Sprintf(", but may be %q", near)
		} else if len(values) < 5 {
			why += ", but one of " + quoted(values)
		}
		return why
	}
	if m.claim == "workflow_ref" || m.claim == "job_workflow_ref" {
		if !slices.ContainsFunc(m.values, func(v string) bool { return strings.Contains(v, "@") || strings.HasSuffix(v, "*") }) {
			return m.claim + " ends in @ and a ref, such as OWNER/REPO/.github/workflows/ci.yml@refs/heads/main"
		}
	}
	return ""
}

// disjoint tells whether two matchers on one claim have no value in common, as far as values are spelt out.
func (m *matcher) disjoint(o *matcher) bool {
	if !m.literal() {
		m, o = o, m
	}
	return m.literal() && !slices.ContainsFunc(m.values, o.match)
}

// twoOwners: the repository lies with another owner.
func (w *way) twoOwners() string {
	for _, owner := range w.on(claimOwner) {
		for _, repo := range w.on(claimRepo) {
			if owners := pinned(claimRepo, repo.values); owners != nil && !slices.ContainsFunc(owners, owner.match) {
				return fmt.Sprintf("repository_owner has to be %s and repository %s", quoted(owner.values), quoted(repo.values))
			}
		}
	}
	return ""
}

// twoRepositories: workflow_ref is always in the repository whose job it is; only job_workflow_ref may be elsewhere.
func (w *way) twoRepositories() string {
	for _, ref := range w.on("workflow_ref") {
		for _, repo := range w.on(claimRepo) {
			same := func(v string) bool {
				parts := strings.SplitN(v, "/", 3)
				name := strings.Join(parts[:min(2, len(parts))], "/")
				return strings.Contains(name, "*") || repo.match(name)
			}
			if !slices.ContainsFunc(ref.values, same) {
				return fmt.Sprintf("workflow_ref is always in the job's own repository, which has to be %s; a reusable workflow elsewhere is job_workflow_ref", quoted(repo.values))
			}
		}
	}
	return ""
}

// refOfType: a branch is under refs/heads/, a tag under refs/tags/.
func (w *way) refOfType() string {
	for _, kind := range w.on("ref_type") {
		for _, ref := range w.on("ref") {
			if !kind.match("tag") && ref.allUnder("refs/tags/") || !kind.match("branch") && ref.allUnder("refs/heads/") {
				return fmt.Sprintf("ref_type has to be %s and ref %s", quoted(kind.values), quoted(ref.values))
			}
		}
	}
	return ""
}

// refOfEvent: a pull request's ref is refs/pull/N/merge.
func (w *way) refOfEvent() string {
	for _, event := range w.on(claimEvent) {
		for _, ref := range w.on("ref") {
			if event.only(onPull) && ref.allUnder("refs/heads/", "refs/tags/") {
				return fmt.Sprintf("the ref of event %s is refs/pull/N/merge, not one of %s; base_ref is the branch that it goes to", quoted(event.values), quoted(ref.values))
			}
		}
	}
	return ""
}

// refsOfEvent: other events carry neither base_ref nor head_ref.
func (w *way) refsOfEvent() string {
	for _, event := range w.on(claimEvent) {
		for _, ref := range w.on("base_ref", "head_ref") {
			if event.literal() && !slices.ContainsFunc(event.values, func(v string) bool { return strings.HasPrefix(v, "pull_request") }) {
				return fmt.Sprintf("%s is empty for event %s", ref.claim, quoted(event.values))
			}
		}
	}
	return ""
}

// allUnder tells whether every value lies under one of the prefixes.
func (m *matcher) allUnder(prefixes ...string) bool {
	for _, v := range m.values {
		fixed, _, _ := strings.Cut(v, "*")
		if !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(fixed, p) }) {
			return false
		}
	}
	return true
}

// only tells whether every value is spelt out and one of some.
func (m *matcher) only(some []string) bool {
	return m.literal() && !slices.ContainsFunc(m.values, func(v string) bool { return !slices.Contains(some, v) })
}

// deployWords in a rule's name or environment say that it changes what runs for others.
var deployWords = []string{"deploy", "release", "publish", "prod", "live", "ship", "rollout"}

// deploys tells whether a rule looks like one that deploys: it is for an environment, or says so in its name.
func (x *ruleLint) deploys() bool {
	name := strings.ToLower(x.r.name)
	return slices.ContainsFunc(deployWords, func(w string) bool { return strings.Contains(name, w) }) ||
		x.some(func(w *way) bool { return w.has("environment") })
}

func (x *ruleLint) refs() {
	if !x.deploys() {
		return
	}
	if x.some(func(w *way) bool { return !w.pinsRef() }) {
		x.warn(RefMissing, x.at("ref"), fmt.Sprintf("rule %q looks like a deployment and is open to every branch and tag", x.r.name),
			"add ref: refs/heads/main, or the refs that are protected")
		return
	}
	wide := []string{"refs/heads/any-branch", "refs/heads/any/branch", "refs/pull/1/merge"}
	for _, sample := range wide {
		if x.some(func(w *way) bool { return w.has("ref") && w.takes("ref", sample) }) {
			x.warn(RefWide, x.at("ref"), fmt.Sprintf("rule %q looks like a deployment, and its ref also takes %s, which anybody with write access can make", x.r.name, sample),
				"name the refs that are protected, such as refs/heads/main and refs/tags/v*")
			return
		}
	}
}

// pinsRef tells whether anything says from which ref the job comes.
func (w *way) pinsRef() bool {
	for _, m := range w.on("workflow_ref", "job_workflow_ref") {
		if !slices.ContainsFunc(m.values, func(v string) bool { return strings.HasSuffix(v, "@**") || strings.HasSuffix(v, "**") }) {
			return true
		}
	}
	for _, m := range w.on("ref_protected") {
		if !m.match("false") {
			return true
		}
	}
	return w.has("ref", "sub", "sha")
}

// takes tells whether a value of a claim passes all of a way's matchers on it.
func (w *way) takes(claim, value string) bool {
	for _, m := range w.on(claim) {
		if !m.match(value) {
			return false
		}
	}
	return true
}
