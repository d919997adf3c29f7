//go:build linux

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// grantIPF3 grants the service's HTTP port and iperf3's.
func grantIPF3(s *stage.Stage) string {
	return fmt.Sprintf("- name: bench\n  network: corp\n  match: {repository_owner_id: %q}\n  allow: [\"tcp %s:%d\", \"tcp %s\"]\n",
		stage.OwnerID, s.Private.Addr(), portIPF3, s.Target(stage.PortHTTP))
}

// relayed gives a stage on which the only way between runner and gateway is the coordinator's relay over this transport, with an
// iperf3 server and a job that is up.
func relayed(b *testing.B, transport string, link lab.Link) (*stage.Stage, *stage.Job) {
	b.Helper()
	runner, gateway := lab.NATOptions{Link: link}, lab.NATOptions{}
	if transport == "websocket" {
		runner.Kind, gateway.Kind = lab.NoUDP, lab.NoUDP
	}
	s := setup(b, stage.Options{Rules: grantIPF3, Runner: runner, Gateway: gateway})
	must(b, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	if _, err := s.Private.Start(lab.Program{Path: program(b, "iperf3"), Args: []string{"-s"}}); err != nil {
		b.Fatal(err)
	}
	job := newJob(b, s, stage.JobOptions{})
	up(b, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	if p := currentPath(b, job); p.Transport != transport || p.direct() {
		b.Fatalf("the path is %v over %s, want a relay over %s", p, p.Transport, transport)
	}
	return s, job
}

var directions = []struct {
	name  string
	flags []string
}{{"up", nil}, {"down", []string{"-R"}}}

// BenchmarkRelay measures one TCP stream by iperf3 through the coordinator's relay, and what that costs. ratio is the median over
// the rounds of that to raw wireguard-go with nothing between its ends; core-s/Gbit is the relay's share of the processor.
func BenchmarkRelay(b *testing.B) {
	iperf := program(b, "iperf3")
	base := setup(b, stage.Options{})
	if _, err := base.Private.Start(lab.Program{Path: iperf, Args: []string{"-s"}}); err != nil {
		b.Fatal(err)
	}
	rawBaseline(b, base)
	for _, transport := range []string{"udp", "websocket"} {
		b.Run(transport, func(b *testing.B) {
			s, job := relayed(b, transport, lab.Link{})
			for _, direction := range directions {
				b.Run(direction.name, func(b *testing.B) {
					var got, ratios, cores []float64
					for range rounds {
						raw := measure(b, base, iperf, rawService, direction.flags)
						before := processorTime(b, s.Coordinator().Pid())
						rate, carried := measureAll(b, s, iperf, s.Private.Addr(), direction.flags)
						spent := processorTime(b, s.Coordinator().Pid()) - before
						got, ratios, cores = append(got, rate), append(ratios, rate/raw), append(cores, spent/carried)
					}
					if p := currentPath(b, job); p.Transport != transport || p.direct() {
						b.Fatalf("the path is %v over %s", p, p.Transport)
					}
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(middle(got), "Mbit/s")
					b.ReportMetric(middle(ratios), "ratio")
					b.ReportMetric(middle(cores), "core-s/Gbit")
					b.ReportMetric(peakMemory(b, s.Coordinator().Pid()), "relay-RSS-MB")
				})
			}
		})
	}
}

// BenchmarkLossyRelay measures the same where the runner's way to the relay takes 20 ms and loses one packet in a hundred. ratio is
// the median of UDP's throughput to WebSocket's.
func BenchmarkLossyRelay(b *testing.B) {
	iperf := program(b, "iperf3")
	link := lab.Link{Delay: 20 * time.Millisecond, Loss: 0.01}
	udp, _ := relayed(b, "udp", link)
	web, _ := relayed(b, "websocket", link)
	for _, direction := range directions {
		b.Run(direction.name, func(b *testing.B) {
			var datagrams, stream, ratios []float64
			for range rounds {
				u := measure(b, udp, iperf, udp.Private.Addr(), direction.flags)
				w := measure(b, web, iperf, web.Private.Addr(), direction.flags)
				datagrams, stream, ratios = append(datagrams, u), append(stream, w), append(ratios, u/w)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(middle(datagrams), "udp-Mbit/s")
			b.ReportMetric(middle(stream), "websocket-Mbit/s")
			b.ReportMetric(middle(ratios), "ratio")
		})
	}
}

// BenchmarkFirstByteEverywhere measures the time to the first byte from networks of each kind, runner's and gateway's alike, in
// turns with the open pair, 80 ms away from each other. ratio is the median of that to the open pair's. The relay is in the middle,
// where the way through it is as long as the direct one, or aside, where each of its round trips takes twice as long.
func BenchmarkFirstByteEverywhere(b *testing.B) {
	program(b, stage.ProxyProgram)
	for _, middle := range []bool{true, false} {
		at := func(kind lab.Kind) *stage.Stage {
			nat := lab.NATOptions{Kind: kind}
			return setup(b, stage.Options{Link: lab.Link{Delay: 20 * time.Millisecond}, Middle: middle, Runner: nat, Gateway: nat})
		}
		open := at(lab.Open)
		for _, kind := range lab.Kinds() {
			name := fmt.Sprintf("relay=%s/%s", map[bool]string{true: "middle", false: "aside"}[middle], strings.ReplaceAll(kind.String(), " ", "-"))
			b.Run(name, func(b *testing.B) {
				s := at(kind)
				var times, bases []time.Duration
				for range 5 {
					base, _ := firstByte(b, open, "tun")
					took, _ := firstByte(b, s, "tun")
					times, bases = append(times, took), append(bases, base)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(median(times).Microseconds())/1000, "first-byte-ms")
				b.ReportMetric(float64(median(times))/float64(median(bases)), "ratio")
			})
		}
	}
}
