package config

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
)

// Report is what a check of a file has found.
type Report struct {
	File     string           `json:"file"`
	OK       bool             `json:"ok"` // the file can be used
	Errors   int              `json:"errors"`
	Warnings int              `json:"warnings"`
	Relay    bool             `json:"relay,omitempty"` // it is a relay's own
	Networks int              `json:"networks"`
	Rules    int              `json:"rules"`
	Findings []policy.Finding `json:"findings"`
}

// CheckReport checks a configuration: a coordinator's, or that of a relay by itself, which is told by its ticket_keys. With files it looks
// for those that the configuration names as well, and warns where this user cannot read one.
func CheckReport(file string, files bool) Report {
	if data, err := readBounded(file); err == nil && relayKey.Match(data) {
		return CheckRelay(file, files)
	}
	more := []func(*reader, *Config){(*reader).lint}
	if files {
		more = append(more, (*reader).lintFiles)
	}
	c, findings := load(file, more...)
	r := reportOf(file, findings)
	if c != nil {
		r.Networks, r.Rules = len(c.Networks), len(c.Rules)
	}
	return r
}

// CheckRules checks a file of rules alone, as a gateway takes it as its own policy.
func CheckRules(file string) Report {
	data, err := readBounded(file)
	if err != nil {
		return reportOf(file, []policy.Finding{unreadable(file, err)})
	}
	rules, findings := policy.LintFile(file, data, policy.Options{}, time.Now())
	r := reportOf(file, findings)
	r.Rules = rules
	return r
}

func unreadable(file string, err error) policy.Finding {
	return policy.Finding{Severity: policy.Mistake, File: file, Message: "cannot be read: " + cause(err).Error(), Next: "give the path of a readable file"}
}

func reportOf(file string, findings []policy.Finding) Report {
	r := Report{File: file, Errors: mistakes(findings), Findings: findings}
	r.Warnings = len(findings) - r.Errors
	r.OK = r.Errors == 0
	if findings == nil {
		r.Findings = []policy.Finding{}
	}
	return r
}

// Err is nil for a file that can be used, and where strict, is free of warnings too.
func (r *Report) Err(strict bool) error {
	switch {
	case !r.OK:
		return problem.New(problem.BadConfig, fmt.Sprintf("%s cannot be used: %s", r.File, count(r.Errors, "error")), "correct what is told above")
	case strict && r.Warnings > 0:
		return problem.New(problem.Failed, fmt.Sprintf("%s has %s", r.File, count(r.Warnings, "warning")),
			"correct what is told above, or let the rule accept it: accept: [CODE]")
	}
	return nil
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// WriteText writes the report for people: a line for every finding, and one for the whole.
func (r *Report) WriteText(w io.Writer) {
	for i := range r.Findings {
		f := &r.Findings[i]
		code := ""
		if f.Code != "" {
			code = fmt.Sprintf(" [%s]", f.Code)
		}
		fmt.Fprintf(w, "%s: %s: %s; %s%s\n", f.Place(), f.Severity, f.Message, f.Next, code)
	}
	var parts []string
	if r.OK {
		parts = append(parts, "ok")
		if r.Networks > 0 {
			parts = append(parts, count(r.Networks, "network"))
		}
		if r.Relay {
			parts = append(parts, "a relay's")
		} else {
			parts = append(parts, count(r.Rules, "rule"))
		}
	}
	if r.Errors > 0 {
		parts = append(parts, count(r.Errors, "error"))
	}
	if r.Warnings > 0 {
		parts = append(parts, count(r.Warnings, "warning"))
	}
	fmt.Fprintf(w, "%s: %s\n", r.File, strings.Join(parts, ", "))
}

// WriteJSON writes a value as indented JSON.
func WriteJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
