package audit

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"time"
)

// maxFindings bounds what a report lists; the rest is counted.
const maxFindings = 100

// Finding is one thing that is wrong with a log.
type Finding struct {
	Record uint64 `json:"record,omitempty"` // where, as far as that can be said
	What   string `json:"what"`
}

// Report is what verifying found out.
type Report struct {
	Records  uint64    `json:"records"`
	Seals    uint64    `json:"seals"`
	First    uint64    `json:"first"` // number of the first record; 0 where there is none
	Last     uint64    `json:"last"`
	Head     string    `json:"head"` // hash of the last record
	From     time.Time `json:"from"`
	Until    time.Time `json:"until"`
	Ended    bool      `json:"ended"` // an export: its end is there
	Findings []Finding `json:"findings"`
	More     int       `json:"more,omitempty"` // findings beyond those that are listed
}

// OK reports whether nothing is wrong.
func (r Report) OK() bool { return len(r.Findings) == 0 }

func (r *Report) find(record uint64, format string, args ...any) {
	if len(r.Findings) >= maxFindings {
		r.More++
		return
	}
	r.Findings = append(r.Findings, Finding{record, fmt.Sprintf(format, args...)})
}

// Anchor is a record that is known from elsewhere, such as an earlier export's end. The zero Anchor is none.
type Anchor struct {
	Record uint64
	Hash   string
}

// Verifier holds a log's lines, in their order, against the chain.
type Verifier struct {
	keys   []ed25519.PublicKey
	anchor Anchor
	report Report

	at      head
	begun   bool
	open    uint64 // records since the last seal
	opened  uint64 // number of the first of these
	skipped bool   // the lines before this one were not understood
}

// NewVerifier makes a verifier that believes these keys.
func NewVerifier(keys ...ed25519.PublicKey) *Verifier { return &Verifier{keys: keys} }

// Line takes the next line, without its newline.
func (v *Verifier) Line(text []byte) {
	if v.report.Ended {
		v.report.find(v.at.seq, "something follows the export's end")
		v.report.Ended = false
	}
	l, err := parseLine(text)
	switch {
	case err != nil:
		v.report.find(v.at.seq+1, "a line after record %d is not one of an audit log", v.at.seq)
		v.skipped = true
	case l.seal != nil:
		v.seal(l.seal)
	case l.end != nil:
		v.end(l.end)
	default:
		v.record(l, text)
	}
}

// record holds a record against the one before it.
func (v *Verifier) record(l line, text []byte) {
	now := head{l.seq, hashOf(text)}
	switch {
	case !v.begun:
		v.begin(l)
	case l.seq <= v.at.seq:
		v.report.find(l.seq, "record %d stands behind record %d: the order was changed, or it was put in", l.seq, v.at.seq)
		return // the chain goes on from where it was
	case l.seq > v.at.seq+1:
		v.report.find(v.at.seq+1, "%s missing before record %d", numbers(v.at.seq+1, l.seq-1), l.seq)
	case l.prev != v.at.hash && !v.skipped:
		v.report.find(v.at.seq, "record %d is not the one that record %d follows: one of them was changed", v.at.seq, l.seq)
	}
	if v.open == 0 {
		v.opened = l.seq
	}
	v.open++
	v.skipped = false
	v.at = now
	if l.seq == v.anchor.Record && now.hash != v.anchor.Hash {
		v.report.find(l.seq, "record %d is another one than it was", l.seq)
	}
	v.report.Records++
	v.report.Last, v.report.Head, v.report.Until = l.seq, now.hash, time.UnixMilli(l.time).UTC()
}

// begin takes the first record, which may be any one: what was before it may have been dropped by age or size.
func (v *Verifier) begin(l line) {
	v.begun = true
	v.report.First, v.report.From = l.seq, time.UnixMilli(l.time).UTC()
	if (l.seq == 1) != (l.prev == "") {
		v.report.find(l.seq, "record %d says that it follows another one than its number does", l.seq)
	}
}

// seal holds a signature against the records before it.
func (v *Verifier) seal(s *Seal) {
	v.report.Seals++
	switch {
	case !signed(v.keys, s.message(), s.Sig):
		v.report.find(s.First, "%s not signed by the coordinator: appended or written anew by somebody else", numbers(s.First, s.Last))
	case v.open == 0:
		v.report.find(s.First, "%s signed, but not there", numbers(s.First, s.Last))
	case s.Last != v.at.seq || s.Head != v.at.hash:
		v.report.find(s.Last, "record %d is not the one that was signed: it was changed, or what followed it was taken out", s.Last)
	case s.First != v.opened || s.Last-s.First+1 != v.open:
		v.report.find(v.opened, "%s not the ones that were signed together: one was taken out or put in, or a signature was", numbers(v.opened, v.at.seq))
	}
	v.open = 0
}

// end takes an export's end.
func (v *Verifier) end(e *Ending) {
	v.unsealed()
	v.report.Ended = true
	switch {
	case !signed(v.keys, e.message(), e.Sig):
		v.report.find(e.Last, "the export's end is not signed by the coordinator")
	case e.First != v.report.First && e.First <= e.Last:
		v.report.find(e.First, "the export began with record %d, not with record %d", e.First, v.report.First)
	case e.Last == v.at.seq && e.Head != v.at.hash:
		v.report.find(e.Last, "record %d is not the one that the export ended with: it was changed", e.Last)
	case e.Last != v.at.seq:
		v.report.find(e.Last, "the export ended with record %d, not with record %d: its tail was cut off", e.Last, v.at.seq)
	}
}

// unsealed tells of records at the end that nobody signed.
func (v *Verifier) unsealed() {
	if v.open > 0 {
		v.report.find(v.opened, "%s not signed: appended by hand, or what followed was cut off", numbers(v.opened, v.at.seq))
	}
	v.open = 0
}

// Finish gives the report. An export has to end with its end.
func (v *Verifier) Finish(export bool) Report {
	v.unsealed()
	if v.anchor.Record > v.at.seq {
		v.report.find(v.at.seq+1, "the log once reached to record %d: its end is gone", v.anchor.Record)
	}
	if export && !v.report.Ended {
		v.report.find(v.at.seq, "the export does not end with its end: its tail was cut off after record %d", v.at.seq)
	}
	return v.report
}

func numbers(first, last uint64) string {
	if first == last {
		return fmt.Sprintf("record %d is", first)
	}
	return fmt.Sprintf("records %d to %d are", first, last)
}

// VerifyExport verifies an export. Its errors are those of reading.
func VerifyExport(r io.Reader, keys ...ed25519.PublicKey) (Report, error) {
	v := NewVerifier(keys...)
	err := eachLine(r, v.Line)
	return v.Finish(true), err
}

// eachLine calls f for every line, without its newline; a line that is too long is given cut, so that it is no line of a
// log. A last line without a newline counts.
func eachLine(r io.Reader, f func([]byte)) error {
	in := bufio.NewReaderSize(r, MaxLine+2)
	for {
		text, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			f(text)
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = in.ReadSlice('\n')
			}
		} else if len(text) > 0 {
			f(bytes.TrimSuffix(text, []byte{'\n'}))
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the export: %w", err)
		}
	}
}
