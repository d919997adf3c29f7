package health

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestAsk(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/healthz":
			_, _ = w.Write([]byte("well\n" + strings.Repeat(" and well", 1000)))
		default:
			problem.Write(w, problem.New(problem.NoGateway, "no gateway is connected", "look at its log"))
		}
	}))
	q := Question{Program: "gateway", Base: server.URL, Transport: &http.Transport{}, Next: "look"}
	if got, err := Ask(t.Context(), q); err != nil || !strings.HasPrefix(got, "well\n") || len(got) > most {
		t.Errorf("alive: %d bytes, %v", len(got), err)
	}
	q.Ready = true
	if _, err := Ask(t.Context(), q); problem.CodeOf(err) != problem.NoGateway || problem.From(err).Next != "look at its log" {
		t.Errorf("not ready: %v", err)
	}
	server.Close()
	if _, err := Ask(t.Context(), q); problem.CodeOf(err) != problem.Unreachable || problem.From(err).Next != "look" {
		t.Errorf("nobody there: %v", err)
	}
}

func TestLocal(t *testing.T) {
	for listen, want := range map[string]string{
		":443": "127.0.0.1:443", "0.0.0.0:443": "127.0.0.1:443", "[::]:443": "127.0.0.1:443", "10.0.0.1:443": "10.0.0.1:443",
		"localhost:443": "localhost:443", "443": "", "": "",
	} {
		if got, err := Local(listen); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", listen, got, err)
		}
	}
}
