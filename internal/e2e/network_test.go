//go:build linux

package e2e

import (
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/doctor"
	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/stage"
)

// What netcheck and doctor tell of networks in front of a runner, from the real coordinator and its relay.
func TestNetcheckAndDoctor(t *testing.T) {
	t.Parallel() // it mostly waits for what does not come
	for _, tc := range []struct {
		kind    lab.Kind
		hard    netcheck.Path // to gateways behind a hard NAT
		mapping string
		udp     bool
	}{
		{lab.Easy, netcheck.PathProbing, "easy", true},
		{lab.Hard, netcheck.PathUDP, "hard", true},
		{lab.OnlyHTTPS, netcheck.PathWebSocket, "", false},
		{lab.OnlyProxy, netcheck.PathWebSocket, "", false},
	} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			t.Parallel()
			if tc.kind.Is(lab.OnlyProxy) {
				program(t, stage.ProxyProgram)
			}
			s := scenery(t, stage.Options{Runner: lab.NATOptions{Kind: tc.kind}})
			if err := s.StartCoordinator(timeout(t, time.Minute)); err != nil {
				t.Fatal(err)
			}
			job := newJob(t, s, stage.JobOptions{Unprivileged: true})
			var r netcheck.Report
			decode(t, culvert(t, job, 0, "netcheck", "--json", "--timeout", "10s").Stdout, &r)
			if r.UDP.Works != tc.udp || string(r.NAT.Mapping) != tc.mapping || r.Tunnel.Paths.Hard != tc.hard {
				t.Errorf("udp %+v, nat %+v, tunnel %+v", r.UDP, r.NAT, r.Tunnel)
			}
			if (r.Proxy != nil) != tc.kind.Is(lab.OnlyProxy) || r.Coordinator.TLS == nil {
				t.Errorf("coordinator %+v, proxy %+v", r.Coordinator, r.Proxy)
			}
			var d doctor.Report
			decode(t, culvert(t, job, 0, "doctor", "--json", "--no-release", "--timeout", "10s").Stdout, &d)
			want := map[string]doctor.Status{"runner/coordinator": doctor.OK, "runner/token": doctor.OK, "runner/stun": doctor.Failed, "runner/probe": doctor.Failed}
			if tc.udp {
				want["runner/stun"], want["runner/probe"] = doctor.OK, doctor.OK
			}
			expect(t, &d, want)
		})
	}
}

// The gateway's and the coordinator's doctor, where they would run.
func TestDoctorsOfTheOtherSides(t *testing.T) {
	s := scenery(t, stage.Options{})
	if err := s.StartCoordinator(timeout(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	var d doctor.Report
	at := newJob(t, s, stage.JobOptions{Host: s.GatewayBox, Unprivileged: true})
	decode(t, output(t, at, s.Binary("culvert-gateway"), "doctor", "--json", "--issuer", s.Issuer.URL(), "--timeout", "10s"), &d)
	expect(t, &d, map[string]doctor.Status{
		"gateway/coordinator": doctor.OK, "gateway/issuer": doctor.OK, "gateway/stun": doctor.OK, "gateway/probe": doctor.OK, "gateway/listen": doctor.Untested,
	})
	at = newJob(t, s, stage.JobOptions{Host: s.Cloud})
	decode(t, output(t, at, s.Binary("culvert-coordinator"), "doctor", "--json", "--config", s.ConfigFile(), "--timeout", "10s"), &d)
	expect(t, &d, map[string]doctor.Status{
		"coordinator/https": doctor.OK, "coordinator/issuer": doctor.OK, "coordinator/stun": doctor.OK, "coordinator/probe": doctor.OK, "coordinator/nats": doctor.Untested,
	})
}

func expect(t *testing.T, r *doctor.Report, want map[string]doctor.Status) {
	t.Helper()
	if !r.OK {
		t.Errorf("something required has failed")
	}
	for _, row := range r.Rows {
		if status, ok := want[row.ID]; ok && row.Status != status {
			t.Errorf("%s is %s, want %s: %+v", row.ID, row.Status, status, row.Checks)
		}
	}
}
