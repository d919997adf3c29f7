package server

import (
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/relayd"
)

// metrics are what this server counts for itself.
type metrics struct {
	audit   *audit.Metrics
	api     *api.Metrics
	reloads *prometheus.CounterVec // by result
	loaded  prometheus.Gauge       // when the configuration in force was taken up
}

func newMetrics() *metrics {
	return &metrics{
		audit: audit.NewMetrics(), api: api.NewMetrics(),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "culvert_coordinator_reloads_total",
			Help: "Changes of the configuration, by whether they were taken up: ok or refused."}, []string{"result"}),
		loaded: prometheus.NewGauge(prometheus.GaugeOpts{Name: "culvert_coordinator_config_loaded_timestamp_seconds",
			Help: "When the configuration in force was taken up."}),
	}
}

// register makes the page of metrics. No label names a session, a job, a repository or a peer: their number has no bound.
func (s *Server) register(r prometheus.Registerer) {
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m := s.metrics
	m.audit.Register(r)
	m.api.Register(r)
	r.MustRegister(m.reloads, m.loaded, census{s})
	if s.relay != nil {
		r.MustRegister(relayd.Collector(s.relay.Stats))
	}
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "culvert_coordinator_" + name, Help: help}, f))
	}
	gauge("streams", "Gateways whose streams this node holds.", func() float64 { return float64(s.api.Streams()) })
	gauge("connections", "Connections to the public listener.", func() float64 { return float64(s.conns.Open()) })
	gauge("state_up", "1 while there is a connection to the state.", func() float64 { return number(s.store.Connected()) })
	gauge("audit_up", "1 while audit records can be stored.", func() float64 { return number(s.audit.Ready() == nil) })
	gauge("draining", "1 while no new joins are taken because this node is about to end.", func() float64 { return number(s.api.Draining()) })
	gauge("rules", "Rules in force.", func() float64 { return float64(len(s.sessions.Rules().Config.Rules)) })
	r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "culvert_coordinator_connections_refused_total",
		Help: "Connections reset because there were too many, in all or of one address."}, func() float64 { return float64(s.conns.Refused()) }))
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "culvert_coordinator_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": s.opts.Version, "go": goVersion()}}, func() float64 { return 1 }))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func goVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.GoVersion
	}
	return "unknown"
}

// took counts a reload.
func (m *metrics) took(err error) {
	if err != nil {
		m.reloads.WithLabelValues("refused").Inc()
		return
	}
	m.reloads.WithLabelValues("ok").Inc()
	m.loaded.Set(float64(time.Now().Unix()))
}

// census counts sessions and gateways when it is asked.
type census struct{ s *Server }

var (
	sessionsDesc = prometheus.NewDesc("culvert_coordinator_sessions", "Live sessions, on all nodes.", []string{"network"}, nil)
	gatewaysDesc = prometheus.NewDesc("culvert_coordinator_gateways", "Gateways that take sessions, on all nodes.", []string{"network"}, nil)
)

// Describe implements [prometheus.Collector].
func (census) Describe(out chan<- *prometheus.Desc) {
	out <- sessionsDesc
	out <- gatewaysDesc
}

// Collect implements [prometheus.Collector].
func (c census) Collect(out chan<- prometheus.Metric) {
	counts := c.s.store.Counts()
	for _, network := range c.s.sessions.Rules().Config.NetworkNames() { // those that exist, so that labels are bounded
		n := counts[network]
		out <- prometheus.MustNewConstMetric(sessionsDesc, prometheus.GaugeValue, float64(n.Sessions), network)
		out <- prometheus.MustNewConstMetric(gatewaysDesc, prometheus.GaugeValue, float64(n.Gateways), network)
	}
}
