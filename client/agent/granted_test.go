package agent

import (
	"context"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// A granted name is waited for, checked and reached through the proxy as the gateway knows it; this host knows nothing of it.
func TestGrantedNames(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Names = agenttest.ServiceNames()
	opts := options(t, w)
	opts.WaitFor = []string{"web.internal:8080"}
	r := start(t, opts)
	ready := r.up(t)
	at, err := url.Parse("http://" + ready.Proxy)
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{"web.internal": "\r\n\r\nhello", "WEB.internal.": "\r\n\r\nhello", "other.invalid": "502 Bad Gateway"} {
		conn, err := net.Dial("tcp", at.Host)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "CONNECT "+host+":8080 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\nGET / HTTP/1.0\r\n\r\n")
		said, err := io.ReadAll(conn)
		if err != nil || !strings.Contains(string(said), want) {
			t.Errorf("%s through the proxy: %q, %v", host, said, err)
		}
		conn.Close()
	}
	got, err := r.Check(context.Background(), "web.internal:8080")
	if err != nil || got.Target != "web.internal:8080" || got.Verdict != wire.Reachable {
		t.Errorf("check: %+v, %v", got, err)
	}
	if asked := w.Gateway.Asked(); len(asked) == 0 || asked[len(asked)-1] != "web.internal:8080" {
		t.Errorf("the gateway was asked about %q", asked)
	}
}

// A gateway that claims the names that the runner lives on does not get them.
func TestTheRunnersOwnNamesStayOutside(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Names = agenttest.ServiceNames()
	w.Gateway.Names.Exact = append(w.Gateway.Names.Exact, "github.com", "api.github.com")
	w.Gateway.Names.Suffixes = []string{"com"}
	r := start(t, options(t, w))
	r.up(t)
	for host, want := range map[string]bool{"github.com": false, "api.github.com": false, "anything.com": false, "web.internal": true} {
		if got := r.granted.Covers(host); got != want {
			t.Errorf("%s is the tunnel's: %v", host, got)
		}
	}
}

func TestWaitForANameThatIsDenied(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Names = agenttest.ServiceNames()
	w.Gateway.Names.Exact = append(w.Gateway.Names.Exact, "gone.internal") // its DNS refuses it all the same
	opts := options(t, w)
	opts.WaitFor = []string{"gone.internal:80"}
	if p := start(t, opts).failure(t); p.Code != problem.FlowDenied {
		t.Errorf("error = %v", p)
	}
}
