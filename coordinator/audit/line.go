package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Line is a record for people: one line, and below a record of flows one for each that verdict chooses, all where it is empty.
func Line(text []byte, verdict string) string {
	var r struct {
		Record
		Metadata struct {
			Event    Event  `json:"event_code"`
			Sequence uint64 `json:"sequence"`
		} `json:"metadata"`
	}
	if json.Unmarshal(text, &r) != nil {
		return string(text)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%d %s %-18s", r.Metadata.Sequence, time.UnixMilli(r.Time).UTC().Format(time.RFC3339), r.Metadata.Event)
	say := func(name, value string) { say(&b, name, value) }
	say("network", r.Unmapped.Network)
	if j := r.Unmapped.Job; j != nil {
		say("repository", j.Repository)
		say("ref", j.Ref)
		say("run", j.RunID)
		say("check", j.CheckRunID)
	}
	if r.Actor != nil {
		say("actor", r.Actor.User.Name)
	}
	if r.Session != nil {
		say("session", r.Session.UID)
		say("reason", r.Session.Reason)
	}
	say("gateway", r.Unmapped.Gateway)
	for _, a := range r.Authorizations {
		say(a.Decision+"-by", a.Policy.Name)
	}
	writeChange(&b, &r.Record)
	say("code", r.Code)
	say("detail", r.Detail)
	say("message", r.Message)
	if r.Count > 0 {
		fmt.Fprintf(&b, " count=%d", r.Count)
	}
	for i := range r.Unmapped.Flows {
		if f := &r.Unmapped.Flows[i]; fits(verdict, f.Verdict) {
			b.WriteByte('\n')
			writeFlow(&b, f)
		}
	}
	return b.String()
}

// writeChange writes what a changed policy or key was and is.
func writeChange(b *bytes.Buffer, r *Record) {
	if c := r.Unmapped.Change; c != nil {
		fmt.Fprintf(b, " rules=%d", c.Rules)
		say(b, "added", strings.Join(c.Added, ","))
		say(b, "removed", strings.Join(c.Removed, ","))
		say(b, "changed", strings.Join(c.Changed, ","))
		say(b, "other", strings.Join(c.Other, ","))
		return
	}
	if r.Entity != nil && r.EntityResult != nil {
		say(b, "was", r.Entity.UID)
		say(b, "is", r.EntityResult.UID)
	}
}

// writeFlow writes what became of a flow.
func writeFlow(b *bytes.Buffer, f *wire.FlowRecord) {
	fmt.Fprintf(b, "    %-8s", plain(string(f.Verdict)))
	say(b, "proto", f.Proto)
	say(b, "name", f.Name)
	if f.Addr.IsValid() {
		say(b, "addr", f.Addr.String())
	}
	say(b, "rule", f.Rule)
	say(b, "reason", f.Reason)
	say(b, "cause", string(f.Cause))
	if f.BytesUp+f.BytesDn > 0 {
		fmt.Fprintf(b, " up=%d down=%d", f.BytesUp, f.BytesDn)
	}
	if f.Count > 1 {
		fmt.Fprintf(b, " count=%d", f.Count)
	}
}

// say writes a value, unless it is empty.
func say(b *bytes.Buffer, name, value string) {
	if value != "" {
		fmt.Fprintf(b, " %s=%s", name, plain(value))
	}
}

// plain quotes a value that could be mistaken for something else.
func plain(value string) string {
	if quoted := strconv.QuoteToASCII(value); strings.ContainsAny(value, " =") || len(quoted) != len(value)+2 {
		return quoted
	}
	return value
}
