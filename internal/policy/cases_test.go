package policy

import (
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestParseCasesRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"cases: []": "c.yaml:1:1: the file holds no case", "": "c.yaml: the file is empty", "case: []": `c.yaml:1:1: unknown key "case"`,
		"cases: [{allowed: true}]":                                                         "c.yaml:1:9: a case has no name",
		"cases: [{name: a, allowed: true}, {name: a, allowed: true}]":                      "c.yaml:1:42: the name",
		"cases: [{name: a}]":                                                               "expects nothing",
		"cases: [{name: a, allowed: false, rules: [x]}]":                                   "to be denied and to get something",
		"cases: [{name: a, closest: {rule: x}, rules: [x]}]":                               "to be denied and to get something",
		"cases: [{name: a, reaches: ['tcp 10.0.0.0/8:1']}]":                                "c.yaml:1:29: \"tcp 10.0.0.0/8:1\" is more than one host",
		"cases: [{name: a, reaches: ['tcp *.corp:1']}]":                                    "more than one host",
		"cases: [{name: a, reaches: ['tcp internet:1']}]":                                  "more than one host",
		"cases: [{name: a, refuses: ['tcp 10.0.0.1:1', 'tcp 10.0.0.1:1-2']}]":              "c.yaml:1:47: \"tcp 10.0.0.1:1-2\" is more than one port",
		"cases: [{name: a, refuses: ['tcp,udp 10.0.0.1:1']}]":                              "more than one protocol",
		"cases: [{name: a, refuses: ['10.0.0.1']}]":                                        "is not protocols",
		"cases: [{name: a, allowed: true, claims: {ref: [a]}}]":                            "a claim has to be a text",
		"cases: [{name: a, allowed: true, at: soon}]":                                      "2027-01-31",
		"defaults: {repository_owner_id: {}}\ncases: [{name: a, allowed: true, at: soon}]": "a claim has to be a text",
	} {
		_, err := ParseCases("c.yaml", []byte(text))
		if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzParseCases looks for panics, in reading and in running.
func FuzzParseCases(f *testing.F) {
	p := policyOf(f, Options{}, sound())
	f.Add([]byte("defaults: {repository_owner_id: 9919, repository: acme/shop}\ncases: [{name: a, rules: deploy, reaches: ['tcp 10.0.0.5:5432'], at: 2026-01-01}]"))
	f.Add([]byte("cases: [{name: a, claims: {iss: null}, closest: {rule: x, claim: y}}, {name: b, network: x, allow: ['tcp x:1'], refuses: ['icmp ::1']}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseCases("c.yaml", data)
		if err != nil {
			if e := problem.From(err); e.Code != problem.BadConfig || e.Next == "" {
				t.Fatalf("error %#v", e)
			}
			return
		}
		if _, err := c.Run(p, []string{"corp"}, today); err != nil && problem.CodeOf(err) != problem.NoNetwork {
			t.Fatal(err)
		}
	})
}
