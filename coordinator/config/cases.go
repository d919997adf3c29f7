package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
)

// CasesReport is what came of a file of cases.
type CasesReport struct {
	File      string              `json:"file"`
	Passed    int                 `json:"passed"`
	Failed    int                 `json:"failed"`
	Results   []policy.CaseResult `json:"results"`
	Uncovered []string            `json:"uncovered,omitempty"` // rules that no case matches
}

// RunCases holds a file of cases against the rules. Its errors are *problem.Error: the file cannot be used.
func (c *Config) RunCases(file string, now time.Time) (*CasesReport, error) {
	data, err := readBounded(file)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot read %s: %v", file, cause(err)), "give the path of a readable file of cases")
	}
	cases, err := policy.ParseCases(file, data)
	if err != nil {
		return nil, err
	}
	results, err := cases.Run(c.Policy, c.NetworkNames(), now)
	if err != nil {
		return nil, err
	}
	r := &CasesReport{File: file, Results: results}
	matched := map[string]bool{}
	for i := range results {
		if results[i].Passed {
			r.Passed++
		} else {
			r.Failed++
		}
		for _, name := range results[i].Rules {
			matched[name] = true
		}
	}
	r.Uncovered = slices.DeleteFunc(c.Policy.Names(), func(name string) bool { return matched[name] })
	return r, nil
}

// Err is nil where every case passed.
func (r *CasesReport) Err() error {
	if r.Failed == 0 {
		return nil
	}
	return problem.New(problem.Failed, fmt.Sprintf("%s of %d failed", count(r.Failed, "case"), len(r.Results)), "change the rules, or what the cases expect")
}

// WriteText writes the report for people.
func (r *CasesReport) WriteText(w io.Writer) {
	for i := range r.Results {
		c := &r.Results[i]
		if c.Passed {
			fmt.Fprintf(w, "ok    %s\n", c.Name)
			continue
		}
		fmt.Fprintf(w, "FAIL  %s\n", c.Name)
		for _, d := range c.Differences {
			fmt.Fprintf(w, "      %s\n", d)
		}
	}
	if len(r.Uncovered) > 0 {
		fmt.Fprintf(w, "no case is let in by: %s\n", strings.Join(r.Uncovered, ", "))
	}
	fmt.Fprintf(w, "%s: %d passed, %d failed\n", r.File, r.Passed, r.Failed)
}
