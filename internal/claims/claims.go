// Package claims verifies OIDC tokens: issuers, key sets, the key-bound audience.
//
// A token is believed in this order, and nothing of it is used before its step: its size and shape, its algorithm
// (RS256 alone), its issuer (one that is configured, byte for byte), its signature by a key of that issuer, its
// audience, its times. The signature and the registered claims are checked by go-oidc; this package brings the keys,
// because go-oidc's own key set fetches anew for every unknown key id.
package claims

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Claims are the claims of a token. All that GitHub documents are typed, as text, empty where the token carries no such
// claim; every claim stays matchable by name through [Claims.Get].
//
// Source: GitHub Docs, "OpenID Connect reference" (content/actions/reference/security/oidc.md), read in November 2026.
type Claims struct {
	// Registered claims, RFC 7519 section 4.1.

	Issuer    string    // iss: who signed it
	Subject   string    // sub: text, never parsed: GitHub has two formats of it, and administrators can re-template it
	Audience  []string  // aud: whom it is for
	JTI       string    // jti: unique id of the token
	IssuedAt  time.Time // iat: when it was made
	NotBefore time.Time // nbf: not valid before; ten minutes before iat at GitHub; zero where absent
	Expiry    time.Time // exp: not valid from then on; five minutes after iat at GitHub

	// Where the job comes from. Names are recycled after a deletion, ids are not.

	Repository           string // repository: "owner/name"
	RepositoryID         string // repository_id: number of the repository
	RepositoryOwner      string // repository_owner: name of the organisation or user that owns the repository
	RepositoryOwnerID    string // repository_owner_id: number of the owner
	RepositoryVisibility string // repository_visibility: "public", "private" or "internal"
	Enterprise           string // enterprise: name of the enterprise that contains the repository
	EnterpriseID         string // enterprise_id: number of the enterprise
	Actor                string // actor: personal account that started the run
	ActorID              string // actor_id: number of that account

	// What made it run.

	EventName   string // event_name: the event that triggered the run, such as "push"
	Ref         string // ref: git ref that triggered the run, such as "refs/heads/main"
	RefType     string // ref_type: "branch" or "tag"
	BaseRef     string // base_ref: target branch of a pull request
	HeadRef     string // head_ref: source branch of a pull request
	SHA         string // sha: the commit; carried by tokens though missing from GitHub's table
	Environment string // environment: the job's environment, where it names one

	// What runs.

	Workflow          string // workflow: name of the workflow
	WorkflowRef       string // workflow_ref: path and ref of the workflow, "owner/name/.github/workflows/ci.yml@refs/heads/main"
	WorkflowSHA       string // workflow_sha: commit of the workflow file
	JobWorkflowRef    string // job_workflow_ref: path and ref of the reusable workflow, where the job uses one
	JobWorkflowSHA    string // job_workflow_sha: commit of the reusable workflow's file
	RunID             string // run_id: id of the workflow run
	RunNumber         string // run_number: how often this workflow has run
	RunAttempt        string // run_attempt: how often this run has been tried
	CheckRunID        string // check_run_id: id of the job's check run, in tokens since November 2025
	RunnerEnvironment string // runner_environment: "github-hosted" or "self-hosted"

	raw map[string]value
}

// Parse reads claims from a JSON object without verifying anything: for claims that an operator wrote, such as the input
// of `explain`. Duplicate names, in any spelling of upper and lower case, are refused.
func Parse(payload []byte) (*Claims, error) {
	raw, err := parseObject(payload)
	if err != nil {
		return nil, err
	}
	c := &Claims{raw: raw}
	if err := c.readRegistered(); err != nil {
		return nil, err
	}
	c.readJob()
	return c, nil
}

// Get gives a claim by its name in the token, as text, and whether the token carries it. Strings come as they are,
// numbers and booleans as their JSON text, objects and arrays as compact JSON. A claim that is null is not carried.
func (c *Claims) Get(name string) (string, bool) {
	v, ok := c.raw[name]
	if !ok || v.isNull() {
		return "", false
	}
	if v.json[0] == '{' || v.json[0] == '[' {
		return compact(v.json), true
	}
	return v.text, true
}

func compact(text string) string {
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(text)); err != nil {
		return text
	}
	return b.String()
}

// Names lists the claims that the token carries, in no order.
func (c *Claims) Names() []string {
	return slices.AppendSeq(make([]string, 0, len(c.raw)), maps.Keys(c.raw))
}

// text is Get for the typed fields.
func (c *Claims) text(name string) string {
	s, _ := c.Get(name)
	return s
}

func (c *Claims) readRegistered() error {
	var err error
	c.Issuer, c.Subject, c.JTI = c.text("iss"), c.text("sub"), c.text("jti")
	if c.Audience, err = c.audience(); err != nil {
		return err
	}
	if c.IssuedAt, err = c.time("iat"); err != nil {
		return err
	}
	if c.NotBefore, err = c.time("nbf"); err != nil {
		return err
	}
	c.Expiry, err = c.time("exp")
	return err
}

// readJob fills in the typed claims of GitHub's jobs.
func (c *Claims) readJob() {
	for i := range jobClaims {
		*jobClaims[i].field(c) = c.text(jobClaims[i].name)
	}
}

var jobClaims = []struct {
	name  string
	field func(*Claims) *string
}{
	{"repository", func(c *Claims) *string { return &c.Repository }},
	{"repository_id", func(c *Claims) *string { return &c.RepositoryID }},
	{"repository_owner", func(c *Claims) *string { return &c.RepositoryOwner }},
	{"repository_owner_id", func(c *Claims) *string { return &c.RepositoryOwnerID }},
	{"repository_visibility", func(c *Claims) *string { return &c.RepositoryVisibility }},
	{"enterprise", func(c *Claims) *string { return &c.Enterprise }},
	{"enterprise_id", func(c *Claims) *string { return &c.EnterpriseID }},
	{"actor", func(c *Claims) *string { return &c.Actor }},
	{"actor_id", func(c *Claims) *string { return &c.ActorID }},
	{"event_name", func(c *Claims) *string { return &c.EventName }},
	{"ref", func(c *Claims) *string { return &c.Ref }},
	{"ref_type", func(c *Claims) *string { return &c.RefType }},
	{"base_ref", func(c *Claims) *string { return &c.BaseRef }},
	{"head_ref", func(c *Claims) *string { return &c.HeadRef }},
	{"sha", func(c *Claims) *string { return &c.SHA }},
	{"environment", func(c *Claims) *string { return &c.Environment }},
	{"workflow", func(c *Claims) *string { return &c.Workflow }},
	{"workflow_ref", func(c *Claims) *string { return &c.WorkflowRef }},
	{"workflow_sha", func(c *Claims) *string { return &c.WorkflowSHA }},
	{"job_workflow_ref", func(c *Claims) *string { return &c.JobWorkflowRef }},
	{"job_workflow_sha", func(c *Claims) *string { return &c.JobWorkflowSHA }},
	{"run_id", func(c *Claims) *string { return &c.RunID }},
	{"run_number", func(c *Claims) *string { return &c.RunNumber }},
	{"run_attempt", func(c *Claims) *string { return &c.RunAttempt }},
	{"check_run_id", func(c *Claims) *string { return &c.CheckRunID }},
	{"runner_environment", func(c *Claims) *string { return &c.RunnerEnvironment }},
}

// audience reads aud, which is a string or an array of strings (RFC 7519, section 4.1.3).
func (c *Claims) audience() ([]string, error) {
	v, ok := c.raw["aud"]
	if !ok {
		return nil, nil
	}
	if v.isString() {
		return []string{v.text}, nil
	}
	var list []string
	if err := json.Unmarshal([]byte(v.json), &list); err != nil {
		return nil, errors.New("the claim aud is neither a string nor a list of strings")
	}
	return list, nil
}

// lastSecond is the end of the year 9999: the greatest time that Go's JSON encoding of times can carry.
const lastSecond = 253402300799

// time reads a NumericDate (RFC 7519, section 2): seconds since 1970, possibly with a fraction.
func (c *Claims) time(name string) (time.Time, error) {
	v, ok := c.raw[name]
	if !ok || v.isNull() {
		return time.Time{}, nil
	}
	seconds, err := strconv.ParseFloat(v.json, 64) // JSON's numbers are among Go's, and nothing else of JSON is
	if err != nil || seconds < 0 || seconds > lastSecond {
		return time.Time{}, fmt.Errorf("the claim %s is no time: %s", name, clip(v.text))
	}
	whole, part := math.Modf(seconds)
	return time.Unix(int64(whole), int64(part*1e9)).UTC(), nil
}

// clip shortens text that strangers wrote, for messages.
func clip(s string) string {
	const most = 160
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= most {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprintf("%q…", strings.ToValidUTF8(s[:most], ""))
}
