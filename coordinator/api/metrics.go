package api

import (
	"net/http"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvertnet/culvert/internal/problem"
)

// Metrics count requests. No label comes from a request: routes are ours, and so are codes.
type Metrics struct {
	requests *prometheus.CounterVec   // by route and status
	joins    *prometheus.HistogramVec // by result
	waiting  prometheus.Gauge         // joins in progress
}

// NewMetrics makes counters that nobody reads until they are registered.
func NewMetrics() *Metrics {
	return &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "culvert_coordinator_requests_total",
			Help: "Requests answered, by route and status."}, []string{"route", "status"}),
		joins: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "culvert_coordinator_join_seconds",
			Help:    "Time from a join's body being read to its answer, by result: ok or a problem code.",
			Buckets: []float64{.002, .004, .008, .016, .032, .064, .128, .256, .512, 1, 2, 5, 10, 20}}, []string{"result"}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{Name: "culvert_coordinator_joins_in_progress", Help: "Joins being decided."}),
	}
}

// Register makes the counters part of a page.
func (m *Metrics) Register(r prometheus.Registerer) { r.MustRegister(m.requests, m.joins, m.waiting) }

// joined counts a join.
func (m *Metrics) joined(began time.Time, err error) {
	result := "ok"
	if err != nil {
		result = string(problem.CodeOf(err))
	}
	m.joins.WithLabelValues(result).Observe(time.Since(began).Seconds())
}

// counted counts requests by the route that took them.
func (a *API) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		defer func() {
			route, status := "none", seen.Status()
			if c := chi.RouteContext(r.Context()); c != nil && c.RoutePattern() != "" && status != http.StatusNotFound {
				route = c.RoutePattern()
			}
			if status == 0 { // hijacked, or nothing was written
				status = http.StatusOK
			}
			a.opts.Metrics.requests.WithLabelValues(route, strconv.Itoa(status)).Inc()
		}()
		next.ServeHTTP(seen, r)
	})
}

// Streams counts the gateways whose streams this node holds.
func (a *API) Streams() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.streams)
}
