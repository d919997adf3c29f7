package agent

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// canned answers every request with the same bytes.
type canned struct{ status, media, body string }

func (c canned) RoundTrip(*http.Request) (*http.Response, error) {
	status := http.StatusOK
	if c.status != "ok" {
		status = http.StatusForbidden
	}
	return &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {c.media}}, Body: io.NopCloser(strings.NewReader(c.body))}, nil
}

// FuzzJoinAnswer feeds the client whatever a coordinator could answer to a join: it ends with a session or with an error that says what to
// do, and each line that is taken holds something.
func FuzzJoinAnswer(f *testing.F) {
	session := `{"session":{"id":"s","secret":"x","addresses":["198.18.0.2"],"gateways":[{"name":"g"}],"lease":{"expires":"2026-01-01T00:00:00Z"}}}`
	f.Add("ok", wire.MediaEvents, `{"admitted":{"network":"corp"}}`+"\n"+session)
	f.Add("ok", wire.MediaEvents, `{"problem":{"type":"about:blank","title":"no","status":403,"code":"policy_denied"}}`)
	f.Add("ok", wire.MediaEvents, `{"problem":[]}`)
	f.Add("ok", wire.MediaEvents, strings.Repeat(`{"admitted":{}}`, 100))
	f.Add("ok", "application/json", `{"id":"s","routes":["10.0.0.0/8","::/0"]}`)
	f.Add("no", "application/problem+json", `{"code":"policy_denied","detail":"x","next":"y","status":99999}`)
	f.Add("no", "text/html", `<html>`)
	f.Fuzz(func(t *testing.T, status, media, body string) {
		c := &coordinator{base: "http://127.0.0.1:1", http: &http.Client{Transport: canned{status, media, body}}}
		sessions := 0
		err := c.join(context.Background(), wire.JoinRequest{}, func(e wire.JoinEvent) error {
			if e.Session == nil && e.Admitted == nil {
				t.Error("an event holds nothing")
			}
			if e.Session != nil {
				sessions++
			}
			return nil
		})
		if err == nil && sessions != 1 || err != nil && sessions != 0 {
			t.Errorf("%d sessions and %v", sessions, err)
		}
		if err != nil && problem.CodeOf(err) == "" {
			t.Errorf("%v has no code", err)
		}
	})
}
