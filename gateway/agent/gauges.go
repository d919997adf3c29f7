package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/tunnel"
)

// ages are the upper bounds of the handshakes' histogram, in seconds. WireGuard makes new keys every two minutes while there is
// traffic, and takes none that are older than three.
var ages = []float64{10, 30, 60, 120, 180, 600, 3600}

var (
	ageDesc = prometheus.NewDesc("culvert_gateway_handshake_age_seconds",
		"How long ago the sessions' last WireGuard handshakes were, at this moment; sessions without one are left out.", nil, nil)
	pathDesc  = prometheus.NewDesc("culvert_gateway_paths", "Sessions by the way their packets take.", []string{"path"}, nil)
	dropDesc  = prometheus.NewDesc("culvert_gateway_dropped_packets_total", "Packets dropped, by cause.", []string{"cause"}, nil)
	mendDesc  = prometheus.NewDesc("culvert_gateway_rebuilt_packets_total", "Packets that paths had lost and that were rebuilt from parities.", nil, nil)
	askedDesc = prometheus.NewDesc("culvert_gateway_dns_questions_total", "Questions of jobs to the DNS inside the tunnel, by what became of them.", []string{"verdict"}, nil)
	failDesc  = prometheus.NewDesc("culvert_gateway_resolver_failures_total", "Names that the gateway's own resolver did not answer for.", nil, nil)
	lostDesc  = prometheus.NewDesc("culvert_gateway_flow_records_lost_total", "Records of flows that were let through, lost while the coordinator was away for long.", nil, nil)
	lentDesc  = prometheus.NewDesc("culvert_gateway_buffer_bytes", "Buffers that flows have been lent beyond what each begins with.", nil, nil)
	deepDesc  = prometheus.NewDesc("culvert_gateway_queue_depth", "What waits at this moment, by queue.", []string{"queue"}, nil)
)

// snapshot collects what is read from the whole gateway at once. The values of every label are few and fixed.
type snapshot struct{ gateway *Gateway }

// Describe implements [prometheus.Collector].
func (snapshot) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{ageDesc, pathDesc, dropDesc, mendDesc, askedDesc, failDesc, lostDesc, lentDesc, deepDesc} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (s snapshot) Collect(ch chan<- prometheus.Metric) {
	s.sessions(ch)
	g := s.gateway
	packets := g.plane.tunnel.Stats()
	for cause, n := range drops(packets, g.plane.device.Stats()) {
		ch <- prometheus.MustNewConstMetric(dropDesc, prometheus.CounterValue, float64(n), cause)
	}
	ch <- prometheus.MustNewConstMetric(mendDesc, prometheus.CounterValue, float64(packets.Rebuilt))
	flows := g.traces.Stats()
	resolver := g.plane.resolve.Counts()
	s.services(ch)
	ch <- prometheus.MustNewConstMetric(failDesc, prometheus.CounterValue, float64(resolver.Failures))
	ch <- prometheus.MustNewConstMetric(lostDesc, prometheus.CounterValue, float64(flows.Dropped))
	for queue, n := range map[string]int{
		"control":       g.out.depth(),          // frames for the coordinator
		"verifications": len(g.door.places),     // tokens that are being verified
		"requests":      len(g.slots),           // of the coordinator, under way
		"flow-records":  flows.Waiting,          // not yet sent
		"flow-batches":  flows.Unproven,         // sent, and not yet known to be recorded
		"names":         resolver.Pending,       // that are being resolved
		"packet-bytes":  g.plane.device.Depth(), // from the stack to the tunnel
	} {
		ch <- prometheus.MustNewConstMetric(deepDesc, prometheus.GaugeValue, float64(n), queue)
	}
}

// services tells of what there is only once the coordinator has said which network this is.
func (s snapshot) services(ch chan<- prometheus.Metric) {
	questions, lent := s.gateway.plane.served()
	for verdict, n := range map[string]uint64{
		"answered": questions.Answered, "refused": questions.Refused, "limited": questions.Limited, "malformed": questions.Malformed,
	} {
		ch <- prometheus.MustNewConstMetric(askedDesc, prometheus.CounterValue, float64(n), verdict)
	}
	ch <- prometheus.MustNewConstMetric(lentDesc, prometheus.GaugeValue, float64(lent))
}

// sessions tells of the sessions' tunnels.
func (s snapshot) sessions(ch chan<- prometheus.Metric) {
	now := time.Now()
	paths := map[string]float64{"host": 0, "direct": 0, "relay": 0, "websocket": 0, "none": 0}
	var count uint64
	var sum float64
	buckets := make(map[float64]uint64, len(ages))
	for _, bound := range ages {
		buckets[bound] = 0
	}
	for _, one := range s.gateway.table.opened() {
		at, way := one.carrier.Vitals()
		paths[way]++
		if at.IsZero() {
			continue
		}
		age := max(now.Sub(at).Seconds(), 0)
		count, sum = count+1, sum+age
		for _, bound := range ages {
			if age <= bound {
				buckets[bound]++
			}
		}
	}
	ch <- prometheus.MustNewConstHistogram(ageDesc, count, sum, buckets)
	for way, n := range paths {
		ch <- prometheus.MustNewConstMetric(pathDesc, prometheus.GaugeValue, n, way)
	}
}

// drops names why packets were dropped.
func drops(t tunnel.Stats, d netstack.Stats) map[string]uint64 {
	return map[string]uint64{
		"stranger":       t.Stranger,  // WireGuard from an address that is no validated path
		"junk":           t.Junk,      // neither WireGuard nor STUN
		"no-path":        t.NoPath,    // to a session that has none
		"malformed":      d.Malformed, // no IP packet inside
		"unknown-source": d.Filtered,  // of no session
		"fragment":       d.Fragments, // of packets that did not become whole, or of whose session too many wait
		"uncarried":      d.Uncarried, // what no gateway forwards: IPv6 extension headers, ICMP but for echo and errors
		"to-gateway":     d.Gated,     // of a session that asks the gateway itself too much
		"queue-full":     d.Overflow,  // the tunnel did not keep up
		"over-turn":      t.OverTurn,  // of a session that sends more than its part of what the gateway can take
		"unread":         d.Unread,    // datagrams that come faster than their flow carries them on
	}
}
