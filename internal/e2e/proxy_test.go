//go:build linux

package e2e

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// What the network with only a proxy is, before anything is said of programs in it: no way out but the proxy, and none
// through it without its password or to another port.
func TestOnlyTheProxyLeadsOut(t *testing.T) {
	program(t, stage.ProxyProgram)
	s := setup(t, stage.Options{Runner: lab.NATOptions{Kind: lab.OnlyProxy}})
	with := s.Client(s.Runner, 20*time.Second)
	proxy, err := with.Transport.(*http.Transport).Proxy(&http.Request{URL: &url.URL{Scheme: "https"}})
	must(t, err)
	resp, err := with.Get(s.URL + "/readyz")
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("through the proxy: %s", resp.Status)
	}
	stranger := *proxy
	stranger.User = nil
	for name, tc := range map[string]struct {
		via  *url.URL
		to   string
		want int
	}{
		"without the password": {&stranger, s.URL, http.StatusProxyAuthRequired},
		"to another port":      {proxy, s.URL + ":444", http.StatusForbidden},
	} {
		client, got := s.Client(s.Runner, 20*time.Second), 0
		transport := client.Transport.(*http.Transport)
		transport.Proxy = http.ProxyURL(tc.via)
		transport.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			got = resp.StatusCode
			return nil
		}
		if resp, err := client.Get(tc.to); err == nil {
			resp.Body.Close()
		}
		if got != tc.want {
			t.Errorf("%s: the proxy answers %d, want %d", name, got, tc.want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if conn, err := s.Runner.Dial(ctx, "tcp", net.JoinHostPort(s.Cloud.Addr().String(), "443")); err == nil {
		conn.Close()
		t.Error("past the proxy: connected")
	}
}
