package server

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/policy"
)

// policyRecord says what a configuration that came into force says, and how it differs from the one before, where there
// was one.
func policyRecord(before, now *config.Config) audit.Record {
	r := audit.Record{Event: audit.Policy, Entity: &audit.Entity{Name: now.File, Type: "policy"}}
	r.Succeeded()
	rules := spelledOut(now)
	c := &audit.Change{SHA256: digest(rules), Rules: len(now.Rules), Networks: now.NetworkNames()}
	r.Entity.UID = c.SHA256
	if before != nil {
		r.EntityResult = &audit.Entity{Name: now.File, Type: "policy", UID: c.SHA256}
		was := spelledOut(before)
		r.Entity.UID = digest(was)
		compareRules(c, was, rules)
		c.Other = otherChanges(before, now)
	}
	r.Unmapped.Change = c
	return r
}

// spelled is a rule with what it names: who widens a target or a group changes every rule that names it.
type spelled struct {
	policy.Rule
	Lines map[string][]string                   // of its targets
	Jobs  map[string][]map[string]policy.Values // of its groups
}

func spelledOut(c *config.Config) []spelled {
	out := make([]spelled, 0, len(c.Rules))
	for _, r := range c.Rules {
		s := spelled{Rule: r, Lines: map[string][]string{}, Jobs: map[string][]map[string]policy.Values{}}
		for _, name := range r.Targets {
			s.Lines[name] = c.Targets[name]
		}
		for _, name := range r.Groups {
			s.Jobs[name] = c.Groups[name]
		}
		out = append(out, s)
	}
	return out
}

// digest is a hash of rules that changes when anything that they say does.
func digest(rules []spelled) string {
	data, err := json.Marshal(rules) // maps in the order of their keys
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// maxNamed bounds the rules that a record names.
const maxNamed = 100

// compareRules names what was added, removed and changed. Rules of one name count together.
func compareRules(c *audit.Change, before, now []spelled) {
	was, is := byName(before), byName(now)
	for name := range is {
		switch old, ok := was[name]; {
		case !ok:
			c.Added = append(c.Added, name)
		case digest(old) != digest(is[name]):
			c.Changed = append(c.Changed, name)
		}
	}
	for name := range was {
		if _, ok := is[name]; !ok {
			c.Removed = append(c.Removed, name)
		}
	}
	for _, list := range []*[]string{&c.Added, &c.Changed, &c.Removed} {
		slices.SortFunc(*list, cmp.Compare)
		if more := len(*list) - maxNamed; more > 0 {
			*list = append((*list)[:maxNamed:maxNamed], fmt.Sprintf("and %d more", more))
		}
	}
}

func byName(rules []spelled) map[string][]spelled {
	out := map[string][]spelled{}
	for _, r := range rules {
		out[r.Name] = append(out[r.Name], r)
	}
	return out
}

// otherChanges names what else decides about sessions and gateways and is another than before.
func otherChanges(before, now *config.Config) []string {
	var out []string
	for _, part := range []struct {
		name     string
		was, are any
	}{
		{"issuers", before.Issuers, now.Issuers}, {"lease", before.Lease, now.Lease}, {"stun", before.STUN, now.STUN},
		{"insecure_http", before.InsecureHTTP, now.InsecureHTTP},
	} {
		if !reflect.DeepEqual(part.was, part.are) {
			out = append(out, part.name)
		}
	}
	names := maps.Clone(before.Networks)
	maps.Copy(names, now.Networks)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !reflect.DeepEqual(before.Networks[name], now.Networks[name]) {
			out = append(out, "networks."+name)
		}
	}
	return out
}
