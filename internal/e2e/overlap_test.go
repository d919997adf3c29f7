//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// A runner's network and the private one may use the same addresses, here down to the runner having the gateway's own and a neighbour of
// the runner the service's: a granted name leads to the service, the address to the neighbour.
func TestOverlappingNetworks(t *testing.T) {
	const name, neighbour = "db.internal", "your neighbour"
	lan := netip.MustParsePrefix("10.1.0.0/16")
	s := setup(t, stage.Options{
		Runner: lab.NATOptions{LAN: lan}, Gateway: lab.NATOptions{LAN: lan}, Names: []string{name},
		Rules: func(*stage.Stage) string {
			return fmt.Sprintf("- {name: names, network: %s, match: {repository_owner_id: %q}, allow: [\"tcp %s:%d\"]}\n", stage.Network, stage.OwnerID, name, stage.PortHTTP)
		},
	})
	next, err := s.Net.Host("neighbour", lab.HostOptions{Behind: s.NATs[0]})
	must(t, err)
	if s.Runner.Addr() != s.GatewayBox.Addr() || next.Addr() != s.Private.Addr() {
		t.Fatalf("the networks do not overlap: %v and %v, %v and %v", s.Runner.Addr(), s.GatewayBox.Addr(), next.Addr(), s.Private.Addr())
	}
	l, err := next.Listen(netip.AddrPortFrom(next.Addr(), stage.PortHTTP).String())
	must(t, err)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, neighbour) })}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })

	curl := []string{program(t, "curl"), "--silent", "--show-error", "--max-time", "20"}
	for _, mode := range []string{"tun", "proxy"} {
		job := newJob(t, s, stage.JobOptions{Unprivileged: mode == "proxy"})
		up(t, job, mode, "--wait-for", fmt.Sprintf("%s:%d", name, stage.PortHTTP))
		line := curl
		if mode == "proxy" {
			line = append([]string{s.Binary("culvert"), "exec", "--"}, curl...)
		}
		if got := output(t, job, line[0], append(line[1:], "http://"+name)...); got != stage.Greeting {
			t.Errorf("mode %s: %s answers %q", mode, name, got)
		}
		if got := output(t, job, curl[0], append(curl[1:], "http://"+s.Private.Addr().String())...); got != neighbour {
			t.Errorf("mode %s: %v answers %q", mode, s.Private.Addr(), got)
		}
		culvert(t, job, 0, "down")
	}
}
