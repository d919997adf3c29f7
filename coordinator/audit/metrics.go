package audit

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the log's counters.
type Metrics struct {
	records   *prometheus.CounterVec // by event
	refused   *prometheus.CounterVec // by code
	blocks    prometheus.Counter
	bytes     prometheus.Counter
	commit    prometheus.Histogram
	waited    prometheus.Histogram
	failed    prometheus.Counter
	conflicts prometheus.Counter
	lost      prometheus.Counter
	uncopied  prometheus.Counter
}

// NewMetrics makes counters that nobody reads until they are registered.
func NewMetrics() *Metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "culvert_coordinator_audit_" + name, Help: help})
	}
	seconds := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "culvert_coordinator_audit_" + name, Help: help,
			Buckets: []float64{.0005, .001, .002, .004, .008, .016, .032, .064, .128, .256, .512, 1, 2, 5}})
	}
	return &Metrics{
		records: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "culvert_coordinator_audit_records_total",
			Help: "Audit records stored by this node, by event."}, []string{"event"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "culvert_coordinator_refused_total",
			Help: "Requests refused before their sender had proven anything, by problem code."}, []string{"code"}),
		blocks:    counter("blocks_total", "Groups of records that were synced at once."),
		bytes:     counter("bytes_total", "Bytes of them."),
		commit:    seconds("commit_seconds", "Time to store a group."),
		waited:    seconds("wait_seconds", "Time that a caller waited for its record to be stored."),
		failed:    counter("failures_total", "Tries to store a group that failed; it is tried again."),
		conflicts: counter("conflicts_total", "Tries that another node was ahead of."),
		lost:      counter("lost_total", "Records that nobody waited for and that found no room. Should stay 0."),
		uncopied:  counter("uncopied_total", "Groups left out of the log's copy because its reader stalled."),
	}
}

// Register makes the counters part of a page.
func (m *Metrics) Register(r prometheus.Registerer) {
	r.MustRegister(m.records, m.refused, m.blocks, m.bytes, m.commit, m.waited, m.failed, m.conflicts, m.lost, m.uncopied)
}

func (m *Metrics) committed(batch []*entry, bytes int, took time.Duration) {
	for _, e := range batch {
		m.records.WithLabelValues(string(e.event)).Inc()
	}
	m.blocks.Inc()
	m.bytes.Add(float64(bytes))
	m.commit.Observe(took.Seconds())
}
