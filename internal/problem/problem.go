// Package problem holds the errors that people read: a stable code, what happened and the next step.
//
// Inside a program a [*Error] is an ordinary error that may wrap its cause. Across the API it is an
// RFC 9457 problem document, from which the other side builds the same [*Error] again. The cause never
// crosses: it is for the log of the program that met it.
package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"unicode"
)

// MediaType is the content type of an encoded problem (RFC 9457, section 3).
const MediaType = "application/problem+json"

// maxDocument bounds a problem document read from a peer, in bytes.
const maxDocument = 64 << 10

// Error is an error for a person. Message and Next are lower case and carry no full stop, and neither ever
// holds a token, a key, a secret or a ticket.
type Error struct {
	Code    Code
	Message string  // what happened
	Next    string  // what to do about it
	Denial  *Denial // which rule came closest; only with [Denied]
	Err     error   // the cause, for the log; never sent
}

// Reason is what the system said, such as "address already in use": what Go's net package puts around that, what was tried and where, is for
// the message to say, once. Of an error that is none of the system's it is all.
func Reason(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}

// PortNext is the next step where a program cannot listen: another one has the port, or the user may not have it.
func PortNext(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return "choose a port from 1024 on, or let this user have the low ones: CAP_NET_BIND_SERVICE, or the sysctl net.ipv4.ip_unprivileged_port_start"
	}
	return "choose another address, or stop what holds this one"
}

// Denial tells a job why policy refused it: the rule that came closest and the claim that differed.
type Denial struct {
	Rule     string   `json:"rule"`
	Claim    string   `json:"claim"`
	Expected []string `json:"expected"`
	Got      string   `json:"got"` // empty where the token carries no such claim
}

// New makes an [Error] without a cause.
func New(code Code, message, next string) *Error {
	return &Error{Code: code, Message: message, Next: next}
}

// Wrap makes an [Error] around its cause. The cause shows in logs, not in the API.
func Wrap(err error, code Code, message, next string) *Error {
	return &Error{Code: code, Message: message, Next: next, Err: err}
}

// Error gives code, message and next step on one line, without the cause.
func (e *Error) Error() string {
	s := fmt.Sprintf("%s: %s", e.Code, e.Message)
	if d := e.Denial; d != nil && d.Rule != "" {
		got := "nothing"
		if d.Got != "" {
			got = strconv.Quote(d.Got)
		}
		s += fmt.Sprintf(" (closest rule %q: claim %s expected %q, got %s)", d.Rule, d.Claim, d.Expected, got)
	}
	if e.Next != "" {
		s += "; " + e.Next
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is matches any [*Error] with the same code, so that errors.Is(err, &Error{Code: c}) asks for a code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// From gives the [*Error] in err's chain, or wraps err as [Failed].
func From(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return Wrap(err, Failed, "something unexpected failed", "look at the log of this program for the cause")
}

// CodeOf gives the code in err's chain, [Failed] where there is none, and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	return From(err).Code
}

// Temporary reports whether trying again later may help.
func Temporary(err error) bool { return err != nil && From(err).Code.Temporary() }

// document is the RFC 9457 form.
type document struct {
	Type   string  `json:"type"`
	Title  string  `json:"title"`
	Status int     `json:"status"`
	Detail string  `json:"detail"`
	Code   Code    `json:"code"`
	Next   string  `json:"next,omitempty"`
	Denial *Denial `json:"denial,omitempty"`
}

// MarshalJSON encodes e as an RFC 9457 problem document, without its cause.
func (e *Error) MarshalJSON() ([]byte, error) {
	return json.Marshal(document{
		Type:   "urn:culvert:problem:" + string(e.Code),
		Title:  http.StatusText(e.Code.Status()),
		Status: e.Code.Status(),
		Detail: e.Message,
		Code:   e.Code,
		Next:   e.Next,
		Denial: e.Denial,
	})
}

// UnmarshalJSON decodes a problem document; unknown members are ignored (RFC 9457, section 3.2).
func (e *Error) UnmarshalJSON(data []byte) error {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return err
	}
	if d.Code == "" {
		d.Code = Failed
	}
	*e = Error{Code: Code(oneLine(string(d.Code))), Message: oneLine(d.Detail), Next: oneLine(d.Next), Denial: d.Denial}
	if d := e.Denial; d != nil {
		d.Claim = oneLine(d.Claim) // its other texts are always printed quoted
	}
	return nil
}

// oneLine makes spaces of a peer's control and format characters. Whatever stands at the start of a line in a job's log may
// be a workflow command, and a terminal obeys escape sequences.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// Write sends err as a problem document with its code's status. It is for HTTP handlers.
func Write(w http.ResponseWriter, err error) {
	e := From(err)
	h := w.Header()
	h.Set("Content-Type", MediaType)
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(e.Code.Status())
	_ = json.NewEncoder(w).Encode(e) // the peer went away; nothing is left to tell it
}

// Read builds the error from an HTTP response that is not a success. It reads at most 64 KiB of the body.
// A body that is no problem document (a proxy's page, say) becomes one that names the status.
func Read(resp *http.Response) *Error {
	var e Error
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument))
	if err == nil && json.Unmarshal(body, &e) == nil && e.Message != "" {
		return &e
	}
	code := Failed
	if resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests {
		code = Unreachable
	}
	return New(code, fmt.Sprintf("the server answered %s without a problem document", resp.Status),
		"check that the URL is a Culvert coordinator's and that no proxy answers in its place")
}
