//go:build linux

package e2e

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// The baseline: raw wireguard-go from the runner to the gateway's host, whose kernel forwards to a second address of the
// service. Both tunnels stand at the same time, and runs alternate.
var (
	rawService = netip.MustParseAddr("10.99.1.1")
	rawTunnel  = netip.MustParsePrefix("10.99.0.0/24")
)

const (
	rounds   = 5
	seconds  = "3" // of each run
	portIPF3 = 5201
	rawPort  = 51900
)

// BenchmarkThroughput measures one TCP stream by iperf3, and the client's memory under that load. ratio is the median
// over the rounds of culvert's throughput to the baseline's.
func BenchmarkThroughput(b *testing.B) {
	iperf := program(b, "iperf3")
	s := setup(b, stage.Options{Rules: grantIPF3})
	serveIperf(b, s.Private, iperf)
	baseline := rawBaseline(b, s)
	job := newJob(b, s, stage.JobOptions{})
	up(b, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	for _, direction := range directions {
		b.Run(direction.name, func(b *testing.B) {
			var raw, ours, ratios []float64
			for range rounds {
				base := measure(b, s, iperf, rawService, direction.flags)
				got := measure(b, s, iperf, s.Private.Addr(), direction.flags)
				raw, ours, ratios = append(raw, base), append(ours, got), append(ratios, got/base)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(middle(raw), "raw-Mbit/s")
			b.ReportMetric(middle(ours), "Mbit/s")
			b.ReportMetric(middle(ratios), "ratio")
			b.ReportMetric(peakMemory(b, clientPID(b, job)), "client-RSS-MB")
			b.ReportMetric(peakMemory(b, s.Gateway().Pid()), "gateway-RSS-MB")
			b.ReportMetric(peakMemory(b, baseline.Pid()), "raw-RSS-MB")
		})
	}
}

func middle(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// rawBaseline runs rawwg on both hosts, waits until it carries packets and gives the runner's.
func rawBaseline(b *testing.B, s *stage.Stage) *lab.Process {
	b.Helper()
	bin := filepath.Join(b.TempDir(), "rawwg")
	build := exec.Command("go", "build", "-o", bin, "./rawwg")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOPROXY=off")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build rawwg: %v\n%s", err, out)
	}
	must(b, s.GatewayBox.Forward())
	must(b, s.Private.AddAddr(rawService))
	must(b, s.NATs[1].Route(netip.PrefixFrom(rawService, 32), s.Private))
	must(b, s.NATs[1].Route(rawTunnel, s.GatewayBox))
	runner, gateway := newKey(b), newKey(b)
	start := func(h *lab.Host, own, peer wire.PrivateKey, nat *lab.NAT, allowed string, args ...string) *lab.Process {
		// Both NATs keep ports, so each side finds the other at its NAT's address and keepalives open the way.
		config := fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nendpoint=%s:%d\npersistent_keepalive_interval=1\nallowed_ip=%s\n",
			hex.EncodeToString(own.Bytes()), rawPort, peer.Public().Hex(), nat.Public(), rawPort, allowed)
		proc, err := h.Start(lab.Program{Path: bin, Args: args, Stdin: strings.NewReader(config), Stderr: os.Stderr})
		must(b, err)
		return proc
	}
	baseline := start(s.Runner, runner, gateway, s.NATs[1], "0.0.0.0/0", "raw0", "10.99.0.2/24", rawService.String()+"/32")
	start(s.GatewayBox, gateway, runner, s.NATs[0], "10.99.0.2/32", "raw0", "10.99.0.1/24")
	// iperf3 takes a bare connection amiss.
	knock, err := s.Private.Listen(netip.AddrPortFrom(rawService, 9).String())
	must(b, err)
	defer knock.Close()
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := s.Runner.Dial(timeout(b, time.Second), "tcp", knock.Addr().String())
		if err == nil {
			conn.Close()
			return baseline
		}
		if time.Now().After(deadline) {
			b.Fatalf("the baseline does not come up: %v", err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serveIperf starts iperf3's server on a host, and waits until it listens.
func serveIperf(b *testing.B, h *lab.Host, iperf string) {
	b.Helper()
	server, err := h.Start(lab.Program{Path: iperf, Args: []string{"-s"}})
	must(b, err)
	for deadline := time.Now().Add(20 * time.Second); !listens(b, server.Pid(), 5201); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatal("iperf3's server does not come to listen")
		}
	}
}

// listens reports whether a socket in a process's network namespace listens on a TCP port (proc(5), /proc/net/tcp). Whoever connected to
// find out would be the server's one client.
func listens(t testing.TB, pid int, port uint16) bool {
	t.Helper()
	for _, table := range []string{"tcp", "tcp6"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		must(t, err)
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				return true
			}
		}
	}
	return false
}

// A port is listened on from listening to closing, and not merely because it is connected to.
func TestListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	if !listens(t, os.Getpid(), port) {
		t.Error("a port that is listened on")
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer conn.Close()
	must(t, l.Close())
	if listens(t, os.Getpid(), port) {
		t.Error("a port that is listened on no more")
	}
}

// measure gives one run's throughput in Mbit/s as the receiver saw it.
func measure(b *testing.B, s *stage.Stage, iperf string, to netip.Addr, flags []string) float64 {
	b.Helper()
	rate, _ := measureAll(b, s, iperf, to, flags)
	return rate
}

// measureAll gives all that was carried as well, in Gbit, warm-up included.
func measureAll(b *testing.B, s *stage.Stage, iperf string, to netip.Addr, flags []string) (rate, carried float64) {
	b.Helper()
	// The congestion control that most hosts have, whatever this machine's kernel is configured for.
	args := append([]string{"-c", to.String(), "-t", seconds, "-O", "1", "-J", "-C", "cubic"}, flags...)
	deadline := time.Now().Add(15 * time.Second)
	for {
		var out bytes.Buffer
		if _, err := s.Runner.Run(timeout(b, 30*time.Second), lab.Program{Path: iperf, Args: args, Stdout: &out}); err != nil {
			b.Fatalf("iperf3 %v: %v", args, err)
		}
		var report struct {
			Error     string `json:"error"`
			Intervals []struct {
				Sum struct {
					Bytes float64 `json:"bytes"`
				} `json:"sum"`
			} `json:"intervals"`
			End struct {
				Received struct {
					BitsPerSecond float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			b.Fatalf("iperf3 %v printed %q: %v", args, &out, err)
		}
		if got := report.End.Received.BitsPerSecond; report.Error == "" && got > 0 {
			for _, i := range report.Intervals {
				carried += i.Sum.Bytes * 8 / 1e9
			}
			return got / 1e6, carried
		}
		// The server takes one run at a time, notices late that the last one is over, and then opens its port anew.
		busy := strings.Contains(report.Error, "busy") || strings.Contains(report.Error, "control message") || strings.Contains(report.Error, "onnection refused")
		if !busy || time.Now().After(deadline) {
			b.Fatalf("iperf3 %v: %q", args, report.Error)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func clientPID(b testing.TB, job *stage.Job) int {
	b.Helper()
	var status struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(culvert(b, job, 0, "status", "--json").Stdout), &status); err != nil {
		b.Fatal(err)
	}
	return status.PID
}

// peakMemory is the peak of a process's resident memory so far, in MB.
func peakMemory(b *testing.B, pid int) float64 { return memory(b, pid, "VmHWM:") }

// residentMemory is a process's resident memory now, in MB.
func residentMemory(t testing.TB, pid int) float64 { return memory(t, pid, "VmRSS:") }

// memory reads a line of a process's status (proc(5)), in MB.
func memory(b testing.TB, pid int, name string) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			must(b, err)
			return kb * 1024 / 1e6
		}
	}
	b.Fatalf("no %s", name)
	return 0
}

// BenchmarkFirstByte measures from the start of `culvert up` to the first byte of the service's answer, median of 10.
func BenchmarkFirstByte(b *testing.B) {
	for _, delay := range []time.Duration{0, 20 * time.Millisecond} {
		b.Run(fmt.Sprintf("delay-%v", delay), func(b *testing.B) {
			s := setup(b, stage.Options{Link: lab.Link{Delay: delay}})
			var times, tokens []time.Duration
			for range 10 {
				took, _ := firstByte(b, s, "tun")
				times, tokens = append(times, took), append(tokens, tokenTime(b, s))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(median(times).Microseconds())/1000, "first-byte-ms")
			b.ReportMetric(float64(median(tokens).Microseconds())/1000, "token-ms")
		})
	}
}
