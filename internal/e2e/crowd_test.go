//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// BenchmarkCrowd has twenty jobs, each on a network of its own behind a NAT of its own, join at the same moment, and measures when the
// last one is usable and what processor time a join takes of each program.
func BenchmarkCrowd(b *testing.B) {
	const jobs = 20
	s := setup(b, stage.Options{})
	var crowd []*stage.Job
	for i := range jobs {
		nat, err := s.Net.NAT(fmt.Sprintf("nat-%d", i), lab.NATOptions{})
		must(b, err)
		host, err := s.Net.Host(fmt.Sprintf("crowd-%d", i), lab.HostOptions{Behind: nat})
		must(b, err)
		crowd = append(crowd, newJob(b, s, stage.JobOptions{Host: host}))
	}
	together := func(do func(*stage.Job)) {
		var group sync.WaitGroup
		for _, job := range crowd {
			group.Go(func() { do(job) })
		}
		group.Wait()
	}
	var last, spent, coordinator, gateway []float64
	for range 5 {
		c, g := onProcessors(b, s.Coordinator().Pid()), onProcessors(b, s.Gateway().Pid())
		began := time.Now()
		together(func(job *stage.Job) { culvert(b, job, 0, "up", "--mode", "tun") })
		last = append(last, time.Since(began).Seconds()*1000)
		coordinator = append(coordinator, (onProcessors(b, s.Coordinator().Pid())-c)/jobs)
		gateway = append(gateway, (onProcessors(b, s.Gateway().Pid())-g)/jobs)
		var clients float64
		for _, job := range crowd {
			clients += onProcessors(b, clientPID(b, job))
		}
		spent = append(spent, clients/jobs)
		together(func(job *stage.Job) { culvert(b, job, 0, "down") })
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(middle(last), "ms-to-the-last")
	b.ReportMetric(middle(spent), "client-ms")
	b.ReportMetric(middle(coordinator), "coordinator-ms")
	b.ReportMetric(middle(gateway), "gateway-ms")
}

// onProcessors is how long a process's threads have run so far, in ms (schedstat in proc(5), which counts nanoseconds).
func onProcessors(t testing.TB, pid int) float64 {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	must(t, err)
	var total float64
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that has ended
		}
		ns, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
		must(t, err)
		total += ns / 1e6
	}
	return total
}
