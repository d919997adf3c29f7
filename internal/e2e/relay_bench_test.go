//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
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
	serveIperf(b, s.Private, program(b, "iperf3"))
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
	serveIperf(b, base.Private, iperf)
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

// BenchmarkPathChanges leads one run of iperf3 from the relay to the direct path, back when that is blocked, and to the direct path
// again. It measures how long each change took, in seconds, and the slowest second outside the three that each may take.
func BenchmarkPathChanges(b *testing.B) {
	iperf := program(b, "iperf3")
	for _, direction := range directions {
		b.Run(direction.name, func(b *testing.B) {
			w := newWalk(b, stage.Options{Rules: grantIPF3})
			serveIperf(b, w.stage.Private, iperf)
			var out bytes.Buffer
			args := append([]string{"-c", w.stage.Private.Addr().String(), "-t", "18", "-i", "0.1", "-J", "-C", "cubic"}, direction.flags...)
			w.began = time.Now()
			run, err := w.stage.Runner.Start(lab.Program{Path: iperf, Args: args, Stdout: &out})
			must(b, err)
			for step, name := range []string{"direct-s", "blocked-s", "direct-again-s"} {
				time.Sleep(2 * time.Second)
				b.ReportMetric(w.change(b, step).Seconds(), name)
			}
			if code, err := run.Wait(timeout(b, time.Minute)); code != 0 || err != nil {
				b.Fatalf("iperf3 ended with %d, %v: %s", code, err, &out)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(slowestSecond(b, out.Bytes(), w.allowed), "slowest-Mbit/s")
		})
	}
}

// slowestSecond gives the lowest throughput of any second of an iperf3 run that is allowed no excuse, in Mbit/s.
func slowestSecond(b *testing.B, report []byte, allowed []span) float64 {
	b.Helper()
	var run struct {
		Error     string `json:"error"`
		Intervals []struct {
			Sum struct {
				Start float64 `json:"start"`
				Bytes float64 `json:"bytes"`
			} `json:"sum"`
		} `json:"intervals"`
	}
	if err := json.Unmarshal(report, &run); err != nil || run.Error != "" {
		b.Fatalf("iperf3: %q, %v", run.Error, err)
	}
	const perSecond = 10
	slowest := math.Inf(1)
	for i := 0; i+perSecond <= len(run.Intervals); i++ {
		from := time.Duration(run.Intervals[i].Sum.Start * float64(time.Second))
		if slices.ContainsFunc(allowed, span{from, from + time.Second}.overlaps) {
			continue
		}
		sum := 0.0
		for _, interval := range run.Intervals[i : i+perSecond] {
			sum += interval.Sum.Bytes
		}
		slowest = min(slowest, sum*8/1e6)
	}
	return slowest
}

// BenchmarkFirstByteEverywhere measures the time to the first byte between networks of each kind, 80 ms away from each other, in turns
// with the open pair. ratio is the median of that to the open pair's. The relay is in the middle, where the way through it is as long as
// the direct one, or aside, where each of its round trips takes twice as long and both sides are of the same kind. It takes five minutes; a
// pair is picked by -bench 'Everywhere/middle/runner=easy/gateway=open$'.
func BenchmarkFirstByteEverywhere(b *testing.B) {
	program(b, stage.ProxyProgram)
	for _, middle := range []bool{true, false} {
		b.Run("relay="+map[bool]string{true: "middle", false: "aside"}[middle], func(b *testing.B) {
			at := func(runner, gateway lab.Kind) *stage.Stage {
				return setup(b, stage.Options{
					Link: lab.Link{Delay: 20 * time.Millisecond}, Middle: middle,
					Runner: lab.NATOptions{Kind: runner}, Gateway: lab.NATOptions{Kind: gateway},
				})
			}
			open := at(lab.Open, lab.Open)
			for _, runner := range lab.Kinds() {
				b.Run("runner="+dashed(runner), func(b *testing.B) {
					for _, gateway := range gatewaysFor(runner, middle) {
						b.Run("gateway="+dashed(gateway), func(b *testing.B) {
							compareFirstBytes(b, at(runner, gateway), open)
						})
					}
				})
			}
		})
	}
}

// gatewaysFor are the kinds of network that gateways are in while the runner is in one of this kind: the same, and with the relay in the
// middle others.
func gatewaysFor(runner lab.Kind, middle bool) []lab.Kind {
	kinds := []lab.Kind{runner}
	others := []lab.Kind{lab.Open, lab.Easy, lab.Hard, lab.NoUDP, lab.OnlyProxy}
	if !middle || !slices.ContainsFunc(append(others, lab.OnlyHTTPS), runner.Is) { // what is left does as open, easy or hard do
		return kinds
	}
	for _, k := range others {
		if !k.Is(runner) {
			kinds = append(kinds, k)
		}
	}
	return kinds
}

func dashed(k lab.Kind) string { return strings.ReplaceAll(k.String(), " ", "-") }

// compareFirstBytes measures both in turns, so that what the machine does besides falls on both.
func compareFirstBytes(b *testing.B, s, base *stage.Stage) {
	b.Helper()
	var times, bases []time.Duration
	for range 3 {
		there, _ := firstByte(b, base, "tun")
		took, _ := firstByte(b, s, "tun")
		times, bases = append(times, took), append(bases, there)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(median(times).Microseconds())/1000, "first-byte-ms")
	b.ReportMetric(float64(median(times))/float64(median(bases)), "ratio")
}
