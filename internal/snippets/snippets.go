// Package snippets finds the workflows that the documentation shows, so that tests can hold them to what they promise.
package snippets

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Workflow is a workflow as a page shows it, completed to a whole file where the page leaves out what every reader knows.
type Workflow struct {
	File string // the page, relative to the root that was searched
	Line int    // where its text begins there
	Text string
}

// Name tells one from another in a test's output.
func (w Workflow) Name() string { return fmt.Sprintf("%s:%d", w.File, w.Line) }

var (
	fence = regexp.MustCompile("(?ms)^```ya?ml[^\\n]*\\n(.*?)^```$")
	ours  = regexp.MustCompile(`(?m)\buses: +culvertnet/culvert@`)
)

// Find gives the workflows of README.md and docs below root, in order. Only blocks of YAML that use the action are workflows.
func Find(root string) ([]Workflow, error) {
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		return nil, err
	}
	var all []Workflow
	for _, page := range append([]string{filepath.Join(root, "README.md")}, pages...) {
		data, err := os.ReadFile(page)
		if err != nil {
			return nil, fmt.Errorf("read a page of the documentation: %w", err)
		}
		name, err := filepath.Rel(root, page)
		if err != nil {
			return nil, err
		}
		for _, at := range fence.FindAllSubmatchIndex(data, -1) {
			if text := string(data[at[2]:at[3]]); ours.MatchString(text) {
				line := 1 + strings.Count(string(data[:at[2]]), "\n")
				all = append(all, Workflow{File: name, Line: line, Text: complete(text)})
			}
		}
	}
	return all, nil
}

// complete makes a workflow of a job's keys, and gives one that starts with its jobs something to start on.
func complete(text string) string {
	switch {
	case regexp.MustCompile(`(?m)^on:`).MatchString(text):
		return text
	case regexp.MustCompile(`(?m)^jobs:`).MatchString(text):
		return "on: push\n" + text
	}
	job, indent := "    runs-on: ubuntu-latest\n", "    "
	if regexp.MustCompile(`(?m)^- `).MatchString(text) { // steps alone
		job, indent = job+"    permissions: {id-token: write, contents: read}\n    steps:\n", "      "
	} else if regexp.MustCompile(`(?m)^runs-on:`).MatchString(text) {
		job = ""
	}
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) != "" {
			line = indent + line
		}
		job += line
	}
	return "on: push\njobs:\n  example:\n" + job
}
