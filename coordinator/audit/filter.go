package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Filter chooses records. Empty fields choose all; names compare without regard to case where GitHub's do.
type Filter struct {
	Since, Until time.Time
	Events       []Event
	Repository   string // "owner/name", or "owner/" for all of an owner's
	Run          string // run_id
	Check        string // check_run_id
	Session      string
	Network      string
	Gateway      string // its name
	Rule         string // a rule that allowed, or that came closest
	Actor        string
	Verdict      string // "allowed" or "denied"
}

// seen is what a filter looks at.
type seen struct {
	Prev     *string
	Time     int64
	Action   int `json:"action_id"`
	Metadata struct {
		Event Event `json:"event_code"`
	}
	Actor          Actor
	Session        Session
	Authorizations []Authorization
	Unmapped       struct {
		Network, Gateway string
		Job              Job
		Flows            []struct{ Verdict wire.FlowVerdict }
	}
}

// zero reports whether the filter chooses all.
func (f *Filter) zero() bool {
	return f.Since.IsZero() && f.Until.IsZero() && len(f.Events) == 0 && f.Repository+f.Run+f.Check+f.Session+f.Network+f.Gateway+
		f.Rule+f.Actor+f.Verdict == ""
}

// needles are texts that a record which matches has to contain: searching for them is far cheaper than decoding.
func (f *Filter) needles() []string {
	var out []string
	for _, s := range []string{f.Run, f.Check, f.Session, f.Network} {
		if s != "" && !strings.ContainsAny(s, `"\<>&`) {
			out = append(out, s)
		}
	}
	return out
}

// matches reports whether a line of the log is a record that the filter chooses.
func (f *Filter) matches(text []byte) bool {
	if !bytes.HasPrefix(text, []byte(`{"prev":`)) {
		return false
	}
	if f.zero() {
		return true
	}
	for _, s := range f.needles() {
		if !bytes.Contains(text, []byte(s)) {
			return false
		}
	}
	var r seen
	return json.Unmarshal(text, &r) == nil && r.Prev != nil && f.chooses(&r)
}

func (f *Filter) chooses(r *seen) bool {
	at, job := time.UnixMilli(r.Time), &r.Unmapped.Job
	is := func(want, got string) bool { return want == "" || want == got }
	fold := func(want, got string) bool { return want == "" || strings.EqualFold(want, got) }
	return (f.Since.IsZero() || !at.Before(f.Since)) && (f.Until.IsZero() || !at.After(f.Until)) &&
		(len(f.Events) == 0 || slices.Contains(f.Events, r.Metadata.Event)) &&
		f.repository(job.Repository) && is(f.Run, job.RunID) && is(f.Check, job.CheckRunID) && is(f.Session, r.Session.UID) &&
		is(f.Network, r.Unmapped.Network) && is(f.Gateway, r.Unmapped.Gateway) && fold(f.Actor, r.Actor.User.Name) &&
		f.rule(r.Authorizations) && f.verdict(r)
}

func (f *Filter) repository(got string) bool {
	if strings.HasSuffix(f.Repository, "/") {
		return len(got) > len(f.Repository) && strings.EqualFold(got[:len(f.Repository)], f.Repository)
	}
	return f.Repository == "" || strings.EqualFold(f.Repository, got)
}

func (f *Filter) rule(list []Authorization) bool {
	return f.Rule == "" || slices.ContainsFunc(list, func(a Authorization) bool { return a.Policy.Name == f.Rule })
}

// verdict is about the record, and where that is of flows, about any of them.
func (f *Filter) verdict(r *seen) bool {
	for _, flow := range r.Unmapped.Flows {
		if fits(f.Verdict, flow.Verdict) {
			return true
		}
	}
	switch f.Verdict {
	case decisionAllowed:
		return r.Action == actionAllowed
	case decisionDenied:
		return r.Action == actionDenied
	}
	return true
}

// fits reports whether a flow is one that a filter's verdict chooses: what was let through is allowed, all else is denied.
func fits(verdict string, flow wire.FlowVerdict) bool {
	through := flow == wire.FlowAllowed || flow == wire.FlowObserved
	switch verdict {
	case decisionAllowed:
		return through
	case decisionDenied:
		return !through
	}
	return true
}

// ParseFilter reads a filter from the parameters of a request or the flags of a command: since and until (RFC 3339, or how long
// ago, such as 2h), event (repeatable), repository, run, check, session, network, gateway, rule, actor, verdict.
func ParseFilter(q url.Values, now time.Time) (Filter, error) {
	f := Filter{
		Repository: q.Get("repository"), Run: q.Get("run"), Check: q.Get("check"), Session: q.Get("session"), Network: q.Get("network"),
		Gateway: q.Get("gateway"), Rule: q.Get("rule"), Actor: q.Get("actor"), Verdict: q.Get("verdict"),
	}
	var err error
	if f.Since, err = parseTime("since", q.Get("since"), now); err != nil {
		return f, err
	}
	if f.Until, err = parseTime("until", q.Get("until"), now); err != nil {
		return f, err
	}
	if !f.Since.IsZero() && !f.Until.IsZero() && f.Until.Before(f.Since) {
		return f, problem.New(problem.BadRequest, "until lies before since, so no record can match", "swap them; 3h is longer ago than 2h")
	}
	if r := f.Repository; r != "" && !strings.Contains(r, "/") {
		return f, problem.New(problem.BadRequest, fmt.Sprintf("%q is no repository", r), "write OWNER/NAME, or OWNER/ for all of an owner's")
	}
	for _, name := range q["event"] {
		if _, ok := kinds[Event(name)]; !ok {
			return f, problem.New(problem.BadRequest, fmt.Sprintf("there is no event %q", name), nextEvent(name))
		}
		f.Events = append(f.Events, Event(name))
	}
	if v := f.Verdict; v != "" && v != decisionAllowed && v != decisionDenied {
		return f, problem.New(problem.BadRequest, fmt.Sprintf("%q is no verdict", v), "write allowed or denied")
	}
	return f, nil
}

// nextEvent gives the event that was meant, or all of them.
func nextEvent(name string) string {
	var names []string
	for _, e := range Events() {
		names = append(names, string(e))
	}
	if near := yamlfile.Nearest(name, names); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return "name one of " + strings.Join(names, ", ")
}

func parseTime(name, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(s); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, problem.New(problem.BadRequest, fmt.Sprintf("%s %q is no time", name, s), "write it like 2026-11-20T10:00:00Z, or 2h for two hours ago")
	}
	return t, nil
}
