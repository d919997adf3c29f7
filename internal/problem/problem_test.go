package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestErrorCrossesTheAPIWithoutItsCause(t *testing.T) {
	sent := Wrap(errors.New("dial tcp: the secret cause"), Denied, "no rule lets this job in", "ask the platform team")
	sent.Denial = &Denial{Rule: "deploy", Claim: "ref", Expected: []string{"refs/heads/main"}, Got: "refs/heads/topic"}

	w := httptest.NewRecorder()
	Write(w, fmt.Errorf("join: %w", sent))
	resp := w.Result()
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusForbidden || resp.Header.Get("Content-Type") != MediaType {
		t.Errorf("status %d, content type %q", resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	if strings.Contains(string(body), "secret cause") {
		t.Errorf("the cause crossed: %s", body)
	}
	var members map[string]any
	if err := json.Unmarshal(body, &members); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"type", "title", "status", "detail"} { // RFC 9457, section 3.1
		if members[name] == nil {
			t.Errorf("the document lacks %q: %s", name, body)
		}
	}

	resp.Body = io.NopCloser(strings.NewReader(string(body)))
	got := Read(resp)
	want := &Error{Code: sent.Code, Message: sent.Message, Next: sent.Next, Denial: sent.Denial}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestReadOfWhatIsNoProblem(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		body   string
		want   Code
	}{
		"a proxy's page":              {http.StatusBadGateway, "<html>bad gateway</html>", Unreachable},
		"too many requests":           {http.StatusTooManyRequests, "", Unreachable},
		"not found by another server": {http.StatusNotFound, "404 page not found", Failed},
		"json of something else":      {http.StatusForbidden, `{"message":"go away"}`, Failed},
		"a code that is not known":    {http.StatusTeapot, `{"code":"brand-new","detail":"something new"}`, "brand-new"},
		"an endless body":             {http.StatusForbidden, `{"detail":"` + strings.Repeat("x", 1<<20) + `"}`, Failed},
	} {
		got := Read(&http.Response{StatusCode: tc.status, Status: http.StatusText(tc.status), Body: io.NopCloser(strings.NewReader(tc.body))})
		if got.Code != tc.want {
			t.Errorf("%s: code %q, want %q", name, got.Code, tc.want)
		}
		if got.Message == "" || len(got.Message) > 1000 {
			t.Errorf("%s: a message of %d bytes", name, len(got.Message))
		}
	}
}

func TestErrorText(t *testing.T) {
	e := New(Denied, "no rule lets this job in", "ask the platform team")
	e.Denial = &Denial{Rule: "deploy", Claim: "environment", Expected: []string{"production"}}
	want := `denied: no rule lets this job in (closest rule "deploy": claim environment expected ["production"], got nothing); ask the platform team`
	if got := e.Error(); got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
}

func TestCodesOfErrors(t *testing.T) {
	cause := errors.New("disk on fire")
	err := fmt.Errorf("join: %w", Wrap(cause, NoGateway, "no gateway", "start one"))
	if !errors.Is(err, cause) || !errors.Is(err, &Error{Code: NoGateway}) || errors.Is(err, &Error{Code: Denied}) {
		t.Error("the chain does not tell code and cause")
	}
	if CodeOf(err) != NoGateway || CodeOf(cause) != Failed || CodeOf(nil) != "" {
		t.Error("wrong codes")
	}
	if !Temporary(err) || Temporary(cause) || Temporary(nil) {
		t.Error("wrong word on trying again")
	}
}

// Every code is in the table, has a status of an error and an exit code of the contract; a denial is never tried again.
func TestTableIsComplete(t *testing.T) {
	for code, f := range table {
		if f.status < 400 || f.status > 599 {
			t.Errorf("%s: status %d", code, f.status)
		}
		if f.exit < ExitFailed || f.exit > ExitTimeout {
			t.Errorf("%s: exit code %d", code, f.exit)
		}
		if f.exit == ExitDenied && f.temporary {
			t.Errorf("%s: a denial that is tried again", code)
		}
	}
	if Code("unheard-of").Status() != http.StatusInternalServerError || Code("unheard-of").Exit() != ExitFailed || Code("unheard-of").Temporary() {
		t.Error("a code from a newer program is not taken as a permanent failure")
	}
}

// TestTextOfAPeerStaysOnItsLine: in a job's log a line that begins with "::" is a workflow command, whoever wrote it.
func TestTextOfAPeerStaysOnItsLine(t *testing.T) {
	doc := `{"code":"denied\n::stop-commands::x","detail":"no\n::set-output name=a::b\u001b[2J\u0085","next":"ask\r\n::add-mask::1",` +
		`"denial":{"rule":"r\n::x::","claim":"ref\n::y::","expected":["a\n"],"got":"b\n"}}`
	var e Error
	if err := json.Unmarshal([]byte(doc), &e); err != nil {
		t.Fatal(err)
	}
	if text := e.Error(); strings.ContainsAny(text, "\r\n\x1b\u0085") {
		t.Errorf("control characters of a peer get through: %q", text)
	}
}

// What a program cannot listen on is said once, with the system's own word.
func TestReason(t *testing.T) {
	held, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	_, err = net.Listen("tcp", held.Addr().String())
	if got := Reason(fmt.Errorf("open a socket: %w", err)); got != "address already in use" {
		t.Errorf("%q of %v", got, err)
	}
	if got := Reason(errors.New("no such host")); got != "no such host" {
		t.Errorf("%q", got)
	}
}
