package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// metrics are the gateway's counters and the page that shows them. No label names a session, a job or a repository: their number
// has no bound.
type metrics struct {
	admitted atomic.Uint64
	renewals atomic.Uint64
	refusals *prometheus.CounterVec // by code, of which there are few
	streams  *prometheus.CounterVec // likewise

	mu   sync.Mutex
	past wire.FlowCounts // of sessions that are over

	server   *http.Server
	listener net.Listener
	wg       sync.WaitGroup
}

func newMetrics() *metrics {
	return &metrics{
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_gateway_refused_total", Help: "Offers and renewals refused, by problem code.",
		}, []string{"code"}),
		streams: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_gateway_stream_failures_total", Help: "Streams to the coordinator that ended or did not come about, by problem code.",
		}, []string{"code"}),
	}
}

// streamFailed counts a stream. Its code may be the coordinator's word, which is not to make series at will.
func (m *metrics) streamFailed(code problem.Code) {
	if !code.Known() {
		code = problem.Failed
	}
	m.streams.WithLabelValues(string(code)).Inc()
}

// serve starts the page at address; an empty one serves none.
func (m *metrics) serve(address string, g *Gateway) error {
	if address == "" {
		return nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the metrics page cannot be served on %s: %s", address, problem.Reason(err)),
			"give another address with --metrics")
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry(g), promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 5 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, g.health()) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if g.Draining() {
			problem.Write(w, problem.New(problem.NoGateway, "the gateway is draining", "it takes no new sessions and is about to stop"))
			return
		}
		if err := g.stream.ready(); err != nil {
			problem.Write(w, err)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	m.listener = l
	m.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second}
	m.wg.Go(func() { _ = m.server.Serve(l) })
	return nil
}

// registry is everything that the page shows.
func (m *metrics) registry(g *Gateway) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(m.refusals, m.streams, snapshot{g}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.register(r, g)
	return r
}

// health is the gateway's word on how it is.
func (g *Gateway) health() string {
	if g.Draining() {
		return "draining"
	}
	if p := g.stream.trouble.Load(); p != nil && permanent(p) {
		return "alive, but without the coordinator: " + p.Error()
	}
	return "ok"
}

func (m *metrics) register(r *prometheus.Registry, g *Gateway) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "culvert_gateway_" + name, Help: help}, f))
	}
	counter := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "culvert_gateway_" + name, Help: help}, f))
	}
	flows := func(pick func(wire.FlowCounts) uint64) func() float64 {
		return func() float64 { return float64(pick(g.flows())) }
	}
	gauge("stream_up", "1 while the coordinator has welcomed this gateway.", func() float64 { return float64(g.stream.state.Load()) })
	gauge("sessions", "Sessions held.", func() float64 { return float64(g.table.size()) })
	gauge("sessions_standby", "Of these, sessions that another gateway carries.", func() float64 { return float64(g.table.standbys()) })
	gauge("draining", "1 while the gateway takes no sessions because it is about to stop.", func() float64 {
		if g.Draining() {
			return 1
		}
		return 0
	})
	gauge("flows_open", "Flows that are open.", flows(func(c wire.FlowCounts) uint64 { return c.Open }))
	counter("stream_connects_total", "Times the coordinator welcomed this gateway.", func() float64 { return float64(g.stream.connects.Load()) })
	counter("admitted_total", "Sessions admitted.", func() float64 { return float64(m.admitted.Load()) })
	counter("renewals_total", "Leases renewed.", func() float64 { return float64(m.renewals.Load()) })
	counter("flows_allowed_total", "Flows that a grant covered.", flows(func(c wire.FlowCounts) uint64 { return c.Allowed }))
	counter("flows_observed_total", "Flows that only an observe line covered.", flows(func(c wire.FlowCounts) uint64 { return c.Observed }))
	counter("flows_limited_total", "Flows that a grant covered, of sessions that had used up what they may have.", flows(func(c wire.FlowCounts) uint64 { return c.Limited }))
	counter("flows_denied_total", "Flows that no grant covered.", flows(func(c wire.FlowCounts) uint64 { return c.Denied }))
	counter("flows_failed_total", "Flows whose target refused or did not answer.", flows(func(c wire.FlowCounts) uint64 { return c.Failed }))
	counter("bytes_up_total", "Bytes from jobs to services.", flows(func(c wire.FlowCounts) uint64 { return c.BytesUp }))
	counter("bytes_down_total", "Bytes from services to jobs.", flows(func(c wire.FlowCounts) uint64 { return c.BytesDn }))
}

// flows adds up the counters of all sessions, past ones included. Each is counted exactly once at any moment, so that no
// counter ever falls.
func (g *Gateway) flows() wire.FlowCounts {
	g.metrics.mu.Lock()
	defer g.metrics.mu.Unlock()
	sum := g.metrics.past
	for _, s := range g.table.opened() {
		if !s.counted {
			add(&sum, s.carrier.Counts())
		}
	}
	return sum
}

func add(sum *wire.FlowCounts, c wire.FlowCounts) {
	sum.Open += c.Open
	sum.Allowed += c.Allowed
	sum.Observed += c.Observed
	sum.Denied += c.Denied
	sum.Limited += c.Limited
	sum.Failed += c.Failed
	sum.BytesUp += c.BytesUp
	sum.BytesDn += c.BytesDn
}

// count keeps the counters of a session that is over.
func (m *metrics) count(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.counted = true
	c := s.carrier.Counts()
	c.Open = 0
	add(&m.past, c)
}

// refused counts a refusal.
func (m *metrics) refused(err error) { m.refusals.WithLabelValues(string(problem.CodeOf(err))).Inc() }

func (m *metrics) addr() string {
	if m.listener == nil {
		return ""
	}
	return m.listener.Addr().String()
}

// close ends the page and waits.
func (m *metrics) close() error {
	if m.server == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := m.server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = m.server.Close()
	}
	m.wg.Wait()
	return err
}
