//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// bench is a stage with iperf3 as its private service, a tunnel that is up, and raw wireguard-go beside it.
type bench struct {
	*testing.B
	stage    *stage.Stage
	iperf    string
	baseline *lab.Process
	job      *stage.Job
}

func newBench(b *testing.B, link lab.Link) *bench {
	iperf := program(b, "iperf3")
	s := setup(b, stage.Options{Link: link, Rules: grantIPF3})
	serveIperf(b, s.Private, iperf)
	n := &bench{B: b, stage: s, iperf: iperf, baseline: rawBaseline(b, s), job: newJob(b, s, stage.JobOptions{})}
	up(b, n.job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	return n
}

// against runs iperf3 in turns over raw wireguard-go and over the tunnel and reports the medians and the median of the ratios.
func (n *bench) against(b *testing.B, rounds int, flags ...string) {
	var raw, ours, ratios []float64
	for range rounds {
		base := measure(b, n.stage, n.iperf, rawService, flags)
		got := measure(b, n.stage, n.iperf, n.stage.Private.Addr(), flags)
		raw, ours, ratios = append(raw, base), append(ours, got), append(ratios, got/base)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(middle(raw), "raw-Mbit/s")
	b.ReportMetric(middle(ours), "Mbit/s")
	b.ReportMetric(middle(ratios), "ratio")
}

// BenchmarkStreams measures four TCP streams at once.
func BenchmarkStreams(b *testing.B) {
	n := newBench(b, lab.Link{})
	b.Run("4-up", func(b *testing.B) { n.against(b, 3, "-P", "4") })
	b.Run("4-down", func(b *testing.B) { n.against(b, 3, "-P", "4", "-R") })
}

// BenchmarkLongPath measures one stream with 80 ms between any two hosts, for six seconds from its first byte on.
func BenchmarkLongPath(b *testing.B) {
	n := newBench(b, lab.Link{Delay: 20 * time.Millisecond})
	b.Run("up", func(b *testing.B) { n.against(b, 3, "-O", "0", "-t", "6") })
	b.Run("down", func(b *testing.B) { n.against(b, 3, "-O", "0", "-t", "6", "-R") })
}

// BenchmarkCost measures the processor time of both ends for each Gbit that one stream carries.
func BenchmarkCost(b *testing.B) {
	n := newBench(b, lab.Link{})
	client, gateway := clientPID(b, n.job), n.stage.Gateway().Pid()
	for name, flags := range map[string][]string{"up": nil, "down": {"-R"}} {
		b.Run(name, func(b *testing.B) {
			before, at := processorTime(b, client)+processorTime(b, gateway), n.carried(b)
			for range 3 {
				measure(b, n.stage, n.iperf, n.stage.Private.Addr(), flags)
			}
			gbit := float64(n.carried(b)-at) * 8 / 1e9
			b.ReportMetric(0, "ns/op")
			b.ReportMetric((processorTime(b, client)+processorTime(b, gateway)-before)/gbit, "core-s/Gbit")
		})
	}
}

// BenchmarkConnections measures 1,000 short connections, eight at a time: connect, one request, one answer, close. ratio is that of the
// rates, so more than 1 is faster than raw wireguard-go.
func BenchmarkConnections(b *testing.B) {
	s := setup(b, stage.Options{Rules: grantIPF3})
	for _, addr := range []netip.Addr{rawService, s.Private.Addr()} {
		if addr == rawService {
			rawBaseline(b, s)
		}
		l, err := s.Private.Listen(netip.AddrPortFrom(addr, portIPF3).String())
		must(b, err)
		var served sync.WaitGroup
		served.Go(func() { answerAll(l) })
		b.Cleanup(func() { l.Close(); served.Wait() })
	}
	job := newJob(b, s, stage.JobOptions{})
	up(b, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	var raw, ours, ratios []float64
	for range rounds {
		base, got := connections(b, s, rawService), connections(b, s, s.Private.Addr())
		raw, ours, ratios = append(raw, base), append(ours, got), append(ratios, got/base)
		time.Sleep(time.Second) // until the session may begin another 1,000 flows at once
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(middle(raw), "raw-conn/s")
	b.ReportMetric(middle(ours), "conn/s")
	b.ReportMetric(middle(ratios), "ratio")
}

// answerAll gives each connection its first bytes back and closes it when the other side has.
func answerAll(l net.Listener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		conns.Go(func() {
			defer c.Close()
			buf := make([]byte, 1024)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				_, _ = c.Write(buf[:n])
			}
		})
	}
}

// connections makes 1,000 of them and gives how many a second that is.
func connections(b *testing.B, s *stage.Stage, to netip.Addr) float64 {
	b.Helper()
	const each = 125
	var work sync.WaitGroup
	began := time.Now()
	for range 8 {
		work.Go(func() {
			request, answer := make([]byte, 200), make([]byte, 200)
			for range each {
				c, err := s.Runner.Dial(timeout(b, 10*time.Second), "tcp", netip.AddrPortFrom(to, portIPF3).String())
				if err != nil {
					b.Error(err)
					return
				}
				if _, err = c.Write(request); err == nil {
					_, err = io.ReadFull(c, answer)
				}
				c.Close()
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	work.Wait()
	return 8 * each / time.Since(began).Seconds()
}

// carried counts the bytes on the runner's interface towards its NAT, both ways.
func (n *bench) carried(b *testing.B) uint64 {
	b.Helper()
	out, err := exec.Command("cat", fmt.Sprintf("/proc/%d/net/dev", clientPID(b, n.job))).Output()
	must(b, err)
	var total uint64
	for line := range strings.Lines(string(out)) {
		name, rest, ok := strings.Cut(line, ":")
		if fields := strings.Fields(rest); ok && strings.HasPrefix(strings.TrimSpace(name), "culvert") {
			for _, i := range []int{0, 8} {
				count, err := strconv.ParseUint(fields[i], 10, 64)
				must(b, err)
				total += count
			}
		}
	}
	return total
}

// processorTime is what a process has used so far, user and system, in seconds.
func processorTime(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	must(b, err)
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
	var ticks float64
	for _, field := range fields[11:13] { // utime and stime, proc(5)
		n, err := strconv.ParseFloat(field, 64)
		must(b, err)
		ticks += n
	}
	return ticks / 100 // USER_HZ
}
