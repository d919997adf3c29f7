package agent

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/egress/egresstest"
	"github.com/culvertnet/culvert/internal/problem"
)

// behindProxy is a world whose coordinator can be reached through a proxy alone, which wants a password.
func behindProxy(t *testing.T, scripts ...func(*agenttest.World)) (*agenttest.World, *egresstest.Proxy) {
	t.Helper()
	p := &egresstest.Proxy{User: "runner", Password: "pa:ss", Hosts: map[string]string{}}
	w := agenttest.New(t, append(scripts, func(w *agenttest.World) { w.URL = "http://coordinator.test" })...)
	p.Hosts["coordinator.test"], p.Hosts["coordinator.test:80"] = w.HTTP.Listener.Addr().String(), w.HTTP.Listener.Addr().String()
	egresstest.Start(t, p)
	t.Setenv("HTTP_PROXY", p.URL())
	return w, p
}

// proxied are the options of a job that knows the proxy's address alone.
func proxied(t *testing.T, w *agenttest.World) Options {
	opts := options(t, w)
	opts.InsecureHTTP = true
	opts.lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return opts
}

func TestJoinsThroughAProxy(t *testing.T) {
	w, _ := behindProxy(t)
	r := start(t, proxied(t, w))
	r.up(t)
	if got := r.hello(t); got != "hello" {
		t.Errorf("the service said %q", got)
	}
}

func TestProxyThatWantsAPassword(t *testing.T) {
	w, p := behindProxy(t)
	u, _ := url.Parse(p.URL())
	for _, c := range []struct {
		user *url.Userinfo
		want string
	}{
		{nil, "wants a user and a password"},
		{url.UserPassword("runner", "s3cret"), "does not take the user and password"},
	} {
		u.User = c.user
		t.Setenv("HTTP_PROXY", u.String())
		t.Setenv("HTTPS_PROXY", u.String())
		opts := proxied(t, w)
		opts.Coordinator = strings.Replace(w.URL, "http:", "https:", 1)
		err := start(t, opts).failure(t)
		if err.Code != problem.Failed || !strings.Contains(err.Message, c.want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("got %v, want it to say that the proxy %s", err, c.want)
		}
	}
}

// TestProxysAddressStaysOutside: the way to the proxy must not lead into the tunnel.
func TestProxysAddressStaysOutside(t *testing.T) {
	w, _ := behindProxy(t)
	r := start(t, proxied(t, w))
	r.up(t)
	if kept := r.direct.list(); !slices.ContainsFunc(kept, func(a netip.Addr) bool { return a.String() == "127.0.0.1" }) {
		t.Errorf("kept outside: %v", kept)
	}
}
