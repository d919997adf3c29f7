package agent

import (
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/egress/egresstest"
)

// TestStreamThroughAProxy: a gateway whose only way out is a proxy that wants a password keeps its stream, and finds it again.
func TestStreamThroughAProxy(t *testing.T) {
	c := startCoordinator(t)
	addr := strings.TrimPrefix(c.url(), "http://")
	p := egresstest.Start(t, &egresstest.Proxy{User: "gateway", Password: "pass", Hosts: map[string]string{
		"coordinator.test:80": addr, "coordinator.test": addr,
	}})
	t.Setenv("HTTP_PROXY", p.URL())
	o := validOptions(t)
	o.Coordinator, o.InsecureHTTP, o.Listen = "http://coordinator.test", true, ":0"
	g, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	c.hello()
	p.Cut()
	c.hello()
	if n := len(p.Asked()); n < 2 {
		t.Errorf("the proxy was asked %d times", n)
	}
}
