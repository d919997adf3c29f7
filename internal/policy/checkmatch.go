package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// checkMatch notes what is wrong with a match. Whether it pins anybody is another question: see checkWay.
func (c *compiler) checkMatch(match map[string]Values, path string) {
	if len(match) > MaxMatch {
		c.fail(path, fmt.Sprintf("more than %d claims in one match", MaxMatch), "split the rule")
	}
	for _, claim := range claimNames(match) {
		at := path + yamlfile.Key(claim)
		if !c.failed(checkClaimName(claim, at), at) {
			c.checkValues(claim, match[claim], at)
		}
	}
}

func checkClaimName(claim, at string) *Error {
	if !printable(claim) || strings.ContainsAny(claim, " *") {
		return fault(at, fmt.Sprintf("%.64q is no claim's name", claim), "name one claim of the token, such as repository_owner_id")
	}
	if why, ok := unmatchable[claim]; ok {
		return fault(at, fmt.Sprintf("claim %q %s, so no rule can match on it", claim, why), "remove it")
	}
	if near := misspelt(claim); near != "" {
		return fault(at, fmt.Sprintf("unknown claim %q", claim), fmt.Sprintf("did you mean %q?", near))
	}
	return nil
}

func (c *compiler) checkValues(claim string, values []string, at string) {
	switch {
	case len(values) == 0:
		c.fail(at, fmt.Sprintf("%s has no value, so nothing could match", claim), `give at least one, or "**" for any`)
	case len(values) > MaxValues:
		c.fail(at, fmt.Sprintf("%s has more than %d values", claim, MaxValues), "use a wildcard, or split the rule")
		return
	}
	for i, v := range values {
		where := item(at, i, len(values))
		if !c.failed(checkPattern(v, where), where) {
			c.failed(c.checkMeaning(claim, v, where), where)
		}
	}
}

func checkPattern(v, at string) *Error {
	control := func(r rune) bool { return r < ' ' || r == 0x7f }
	switch {
	case v == "":
		return fault(at, "an empty value never matches", "remove it: a claim that is not in match may have any value or none")
	case len(v) > MaxPattern:
		return fault(at, fmt.Sprintf("the value is longer than %d bytes", MaxPattern), "shorten it with a wildcard")
	case strings.IndexFunc(v, control) >= 0, strings.TrimSpace(v) != v:
		return fault(at, fmt.Sprintf("%q holds control characters or begins or ends with space, so it never matches", v), "remove them")
	}
	return nil
}

// checkMeaning refuses values that can never match what GitHub puts into a claim: a rule that silently does nothing
// gets widened until it does too much.
func (c *compiler) checkMeaning(claim, v, at string) *Error {
	k, _ := lookup(claim)
	switch {
	case k.id && strings.Trim(v, "0123456789") != "":
		return fault(at, fmt.Sprintf("%s is a number, compared whole, not %q", claim, v), "write the numeric id; gh api repos/OWNER/REPO shows them")
	case claim == claimIssuer:
		return c.checkIssuer(v, at)
	case claim == "ref":
		return checkRef(v, at)
	case claim == claimRepo && !strings.Contains(v, "/") && !strings.Contains(v, "**"):
		return fault(at, fmt.Sprintf("a repository is OWNER/REPO, not %q", v), fmt.Sprintf("write the owner too: OWNER/%s", v))
	case claim == claimOwner && strings.Contains(v, "/"):
		return fault(at, fmt.Sprintf("an owner is one name, not %q", v), "match on repository for OWNER/REPO")
	}
	return nil
}

func (c *compiler) checkIssuer(v, at string) *Error {
	if slices.Contains(c.opts.Issuers, c.issuerURL(v)) {
		return nil
	}
	next := "name one exactly, without wildcards: " + quoted(c.issuerWords())
	if near := yamlfile.Nearest(v, c.issuerWords()); near != "" {
		next = fmt.Sprintf("did you mean %q?", near)
	}
	return fault(at, fmt.Sprintf("%q is not an issuer that is configured", v), next)
}

// checkRef refuses what no ref can be: GitHub gives the full name, and git-check-ref-format(1) rules some characters out.
func checkRef(v, at string) *Error {
	if i := strings.IndexAny(v, "~^:?[\\ "); i >= 0 {
		return fault(at, fmt.Sprintf("no ref holds the %q in %q, so it never matches", v[i], v), "values are globs with * and **, not regular expressions")
	}
	fixed, _, _ := strings.Cut(v, "*")
	if strings.HasPrefix(fixed, "refs/") || fixed != v && strings.HasPrefix("refs/", fixed) {
		return nil
	}
	return fault(at, fmt.Sprintf("a ref is a full name, so %q never matches", v),
		fmt.Sprintf("write refs/heads/%s for a branch or refs/tags/%s for a tag", v, v))
}
