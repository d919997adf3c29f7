package load

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"
)

// Report is what was measured.
type Report struct {
	Gateways      int            `json:"gateways"`
	Phases        []Phase        `json:"phases"`
	Sessions      int            `json:"sessions"`                 // that stand at the end
	Verified      uint64         `json:"verified"`                 // tokens that gateways verified
	Renewals      int            `json:"renewals"`                 // that gateways gave and told the coordinator of
	RenewalErrors map[string]int `json:"renewal_errors,omitempty"` // by code
	Lost          int            `json:"lost"`                     // sessions that a coordinator ended of its own accord
	Clashes       int            `json:"clashes"`                  // addresses that two live sessions got; always 0
	Sampled       int            `json:"sampled"`                  // sessions that the coordinator was asked for at the end
	Missing       int            `json:"missing"`                  // of them, those that it did not know, or not as renewed
	KeyFetches    int64          `json:"key_fetches"`              // how often anybody asked the issuer for its keys, these gateways among them
}

// Phase is one part of a run. Times are milliseconds from the moment at which a join was to begin to its last line.
type Phase struct {
	Name    string         `json:"name"` // fill, burst or steady
	Joins   int            `json:"joins"`
	Seconds float64        `json:"seconds"`
	Rate    float64        `json:"joins_per_second"`
	P50     float64        `json:"p50_ms"`
	P90     float64        `json:"p90_ms"`
	P99     float64        `json:"p99_ms"`
	Max     float64        `json:"max_ms"`
	Gap     float64        `json:"gap_ms"`  // the longest time in which no join ended well
	Late    float64        `json:"late_ms"` // p99 of how late the generator itself was; part of the times above
	Retried map[string]int `json:"retried,omitempty"`
	Errors  map[string]int `json:"errors,omitempty"` // by code
}

// Failed counts what went wrong.
func (r *Report) Failed() int {
	n := r.Lost + r.Clashes + r.Missing
	for _, m := range r.RenewalErrors {
		n += m
	}
	for _, p := range r.Phases {
		for _, m := range p.Errors {
			n += m
		}
	}
	return n
}

// WriteText prints the report for people.
func (r *Report) WriteText(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%-8s %9s %8s %9s %9s %9s %9s %9s %9s %9s\n", "phase", "joins", "seconds", "joins/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "gap ms", "late ms")
	for _, p := range r.Phases {
		if err == nil {
			_, err = fmt.Fprintf(w, "%-8s %9d %8.1f %9.0f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f\n", p.Name, p.Joins, p.Seconds, p.Rate, p.P50, p.P90, p.P99, p.Max, p.Gap, p.Late)
		}
	}
	for _, p := range r.Phases {
		for _, list := range []struct {
			what string
			n    map[string]int
		}{{"error", p.Errors}, {"tried again", p.Retried}} {
			for _, code := range slices.Sorted(maps.Keys(list.n)) {
				if err == nil {
					_, err = fmt.Fprintf(w, "%s: %s %s: %d\n", p.Name, list.what, code, list.n[code])
				}
			}
		}
	}
	for _, code := range slices.Sorted(maps.Keys(r.RenewalErrors)) {
		if err == nil {
			_, err = fmt.Fprintf(w, "renewal: error %s: %d\n", code, r.RenewalErrors[code])
		}
	}
	if err == nil {
		_, err = fmt.Fprintf(w, "%d gateways verified %d tokens; %d sessions stand, %d renewals; lost %d, address clashes %d; of %d asked for, %d not as they should be\n",
			r.Gateways, r.Verified, r.Sessions, r.Renewals, r.Lost, r.Clashes, r.Sampled, r.Missing)
	}
	return err
}

// meter collects what happens in a phase.
type meter struct {
	began time.Time
	end   time.Time // zero: until phase is called

	mu      sync.Mutex
	times   []time.Duration
	late    []time.Duration
	done    []time.Time // when joins ended well
	errors  map[string]int
	retries map[string]int
}

func newMeter(n int) *meter {
	return &meter{began: time.Now(), times: make([]time.Duration, 0, n), late: make([]time.Duration, 0, n), done: make([]time.Time, 0, n),
		errors: map[string]int{}, retries: map[string]int{}}
}

func (m *meter) joined(took, late time.Duration) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.times, m.late, m.done = append(m.times, took), append(m.late, late), append(m.done, now)
}

func (m *meter) failed(code string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.errors[code]++
}

func (m *meter) retried(code string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.retries[code]++
}

// phase sums up.
func (m *meter) phase() Phase {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.end.IsZero() {
		m.end = time.Now()
	}
	p := Phase{Joins: len(m.times), Seconds: m.end.Sub(m.began).Seconds(), Errors: m.errors, Retried: m.retries}
	if len(m.times) == 0 {
		return p
	}
	p.Rate = float64(p.Joins) / p.Seconds
	slices.Sort(m.times)
	slices.Sort(m.late)
	slices.SortFunc(m.done, time.Time.Compare)
	p.P50, p.P90, p.P99, p.Max = ms(quantile(m.times, 0.5)), ms(quantile(m.times, 0.9)), ms(quantile(m.times, 0.99)), ms(m.times[len(m.times)-1])
	p.Late = ms(quantile(m.late, 0.99))
	last := m.began
	for _, at := range m.done {
		p.Gap = max(p.Gap, ms(at.Sub(last)))
		last = at
	}
	return p
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// quantile gives the smallest value that is at least as large as the share q of all; sorted must not be empty.
func quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(q*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}
