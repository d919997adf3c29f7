package requirements

import (
	"slices"
	"strings"
	"testing"
)

// Every row is in exactly one rule, or no cloud's firewall has to know of it.
func TestRulesCoverTheList(t *testing.T) {
	in := map[string]int{}
	for _, p := range []Party{Runner, Gateway, Coordinator, Relay} {
		for _, r := range Rules(p) {
			for _, id := range r.Rows {
				in[id]++
			}
			if len(r.Peers) == 0 || r.To < r.From || r.When == "" {
				t.Errorf("%+v", r)
			}
			if r.From == 0 && !slices.Equal(r.Rows, []string{"gateway/targets"}) {
				t.Errorf("no ports are known of %v", r.Rows)
			}
		}
	}
	for _, r := range All() {
		if want := map[bool]int{true: 1, false: 0}[local(r) == ""]; in[r.ID] != want {
			t.Errorf("%s is in %d rules, want %d", r.ID, in[r.ID], want)
		}
	}
}

// What comes in to whom, as a firewall sees it: the one thing that nobody may get wrong.
func TestRulesLetIn(t *testing.T) {
	want := map[Party][]string{
		Gateway:     {"UDP 51820 only with `--public-address`: a port that is forwarded to the gateway lets every runner in directly"},
		Coordinator: {"TCP 443 always", "UDP 3478 unless `udp: off`, for platforms without UDP", "UDP 3479 unless `probe: off`", "TCP 80 with `acme: {http: …}`"},
		Relay:       {"UDP 3478 unless `udp: off`", "UDP 3479 unless `probe: off`", "TCP 443 always"},
	}
	for _, p := range []Party{Runner, Gateway, Coordinator, Relay} {
		var got []string
		for _, r := range Rules(p) {
			if r.Direction == In {
				got = append(got, r.Protocol+" "+r.ports("-")+" "+r.When)
			}
		}
		if !slices.Equal(got, want[p]) {
			t.Errorf("%s: %q, want %q", p, got, want[p])
		}
	}
}

func TestCloudTables(t *testing.T) {
	for _, c := range Clouds() {
		lines := strings.Split(strings.TrimSpace(CloudMarkdown(c)), "\n")
		columns := strings.Count(lines[0], "|")
		for _, l := range lines {
			if strings.Count(l, "|") != columns {
				t.Errorf("%s: %s", c, l)
			}
		}
		if rules := len(lines) - 2; rules < 15 || (c == NetworkACL) != (rules > 35) {
			t.Errorf("%s has %d lines", c, rules)
		}
	}
}
