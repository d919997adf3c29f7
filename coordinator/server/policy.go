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
	c := &audit.Change{SHA256: digest(now.Rules), Rules: len(now.Rules), Networks: now.NetworkNames()}
	r.Entity.UID = c.SHA256
	if before != nil {
		r.EntityResult = &audit.Entity{Name: now.File, Type: "policy", UID: c.SHA256}
		r.Entity.UID = digest(before.Rules)
		compareRules(c, before.Rules, now.Rules)
		c.Other = otherChanges(before, now)
	}
	r.Unmapped.Change = c
	return r
}

// digest is a hash of rules that changes when anything that they say does.
func digest(rules []policy.Rule) string {
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
func compareRules(c *audit.Change, before, now []policy.Rule) {
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

func byName(rules []policy.Rule) map[string][]policy.Rule {
	out := map[string][]policy.Rule{}
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
