package relayd

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvertnet/culvert/internal/relay"
)

// Collector gives a relay's counters to Prometheus. No label names a session or an address: their number has no bound.
func Collector(stats func() relay.Stats) prometheus.Collector { return collector{stats} }

type collector struct{ stats func() relay.Stats }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("culvert_relay_"+name, help, labels, nil)
}

var (
	sessions  = describe("sessions", "Sessions with a side bound.")
	links     = describe("websockets", "WebSockets that are open.")
	packets   = describe("packets_total", "Packets forwarded.")
	carried   = describe("bytes_total", "Bytes forwarded, four of each packet being the relay's own.")
	dropped   = describe("dropped_packets_total", "Packets dropped, by reason.", "reason")
	binds     = describe("binds_total", "Bindings asked for, by what came of it.", "result")
	stun      = describe("stun_total", "STUN Binding requests answered.")
	malformed = describe("malformed_total", "Messages that are none.")
	unserved  = describe("unserved_total", "STUN messages that ask for what a relay does not serve, as netcheck's for an answer from another port.")
)

// Describe names all metrics.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sessions, links, packets, carried, dropped, binds, stun, malformed, unserved} {
		out <- d
	}
}

// Collect reads all counters.
func (c collector) Collect(out chan<- prometheus.Metric) {
	s := c.stats()
	gauge := func(d *prometheus.Desc, v int) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v))
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(sessions, s.Sessions)
	gauge(links, s.Links)
	count(packets, s.Packets)
	count(carried, s.Bytes)
	count(dropped, s.Strangers, "stranger")
	count(dropped, s.Alone, "alone")
	count(dropped, s.OverRate, "rate")
	count(dropped, s.OverShare, "share")
	count(dropped, s.OverQueue, "queue")
	count(dropped, s.Unread, "unread")
	count(binds, s.Bound, "ok")
	count(binds, s.Refused, "refused")
	count(binds, s.Stale, "stale")
	count(binds, s.Limited, "limited")
	count(stun, s.STUN)
	count(malformed, s.Junk)
	count(unserved, s.Unserved)
}

func (s *Server) metricsHandler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(Collector(s.relay.Stats))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 5 * time.Second}))
	mux.HandleFunc("GET /healthz", healthz)
	return mux
}
