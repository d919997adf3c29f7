package policy

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// TestConformance holds tables of (claims, rules) → verdict against the engine: every documented attack on trust policies
// among them, each as what a token would say. The files are of the form that `policy test` takes, beside their rules.
func TestConformance(t *testing.T) {
	const least = 150
	files, err := filepath.Glob("testdata/conformance/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("there are no tables", err)
	}
	cases, refused := 0, 0
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var table struct {
			About   string            `yaml:"about"`
			Issuers map[string]string `yaml:"issuers"`
			Policy  Document          `yaml:"policy"`
			Cases   `yaml:",inline"`
		}
		if err := yamlfile.Decode(file, data, &table); err != nil {
			t.Fatal(err)
		}
		opts := Options{IssuerNames: table.Issuers, Issuers: slices.Sorted(maps.Values(table.Issuers))}
		p, faults := CompileAll([]Source{{File: file, Document: table.Policy}}, opts)
		if len(faults) > 0 {
			t.Fatal(file, faults)
		}
		results, err := table.Run(p, nil, today)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range results {
			t.Run(filepath.Base(file)+"/"+r.Name, func(t *testing.T) {
				for _, d := range r.Differences {
					t.Error(d)
				}
				if !table.Cases.Cases[i].expects() {
					t.Error("the case expects nothing")
				}
			})
			cases++
			if len(r.Rules) == 0 {
				refused++
			}
		}
	}
	t.Logf("%d cases, %d of them refused", cases, refused)
	if cases < least {
		t.Errorf("%d cases are fewer than %d", cases, least)
	}
}
