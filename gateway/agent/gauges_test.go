package agent

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// scrape reads the metrics page: the value of each series by its name and labels.
func (w *world) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	out := map[string]float64{}
	for line := range strings.Lines(w.page(t, "/metrics")) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		v, err := strconv.ParseFloat(value, 64)
		if !ok || err != nil {
			t.Fatalf("not a sample: %q", line)
		}
		out[name] = v
	}
	return out
}

// TestScrape: the page tells of sessions, their handshakes and ways, flows by verdict, drops and queues.
func TestScrape(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	j := w.join(nil)
	if err := j.usable(); err != nil {
		t.Fatal(err)
	}
	if c, err := j.dial(netip.MustParseAddrPort("10.9.9.9:80")); err == nil {
		_ = c.Close()
		t.Error("a flow beyond the grant")
	}
	standby := w.newJob().offer
	standby.Standby = true
	if _, err := w.coord.ask(wire.FrameOffer, standby); err != nil {
		t.Fatal(err)
	}
	junk := w.gateway.plane.tunnel.Stats().Junk
	c, err := j.device.DialContext(t.Context(), "udp", "198.18.0.1:9")
	if err == nil {
		_ = c.Close()
	}
	if questions, err := j.device.DialContext(t.Context(), "udp", "198.18.0.1:53"); err != nil {
		t.Error(err)
	} else {
		defer questions.Close()
		ask := new(dns.Msg).SetQuestion("not.granted.example.", dns.TypeA)
		if answer, err := (&dns.Conn{Conn: questions}), questions.SetDeadline(time.Now().Add(30*time.Second)); err != nil || answer.WriteMsg(ask) != nil {
			t.Error("no question", err)
		} else if m, err := answer.ReadMsg(); err != nil || m.Rcode != dns.RcodeRefused {
			t.Errorf("%v, %v", m, err)
		}
	}
	got := w.scrape(t)
	for name, want := range map[string]float64{
		"culvert_gateway_sessions":                                2,
		"culvert_gateway_sessions_standby":                        1,
		"culvert_gateway_draining":                                0,
		"culvert_gateway_flows_allowed_total":                     1,
		"culvert_gateway_flows_denied_total":                      2, // and a name
		"culvert_gateway_flows_observed_total":                    0,
		"culvert_gateway_flows_limited_total":                     0,
		"culvert_gateway_handshake_age_seconds_count":             1,
		`culvert_gateway_handshake_age_seconds_bucket{le="3600"}`: 1,
		`culvert_gateway_paths{path="none"}`:                      1,
		`culvert_gateway_dropped_packets_total{cause="junk"}`:     float64(junk),
		`culvert_gateway_rebuilt_packets_total`:                   0,
		`culvert_gateway_dns_questions_total{verdict="refused"}`:  1,
		`culvert_gateway_resolver_failures_total`:                 0,
		`culvert_gateway_flow_records_lost_total`:                 0,
		`culvert_gateway_queue_depth{queue="names"}`:              0,
		`culvert_gateway_queue_depth{queue="verifications"}`:      0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
		}
	}
	ways := 0.0
	for _, way := range []string{"host", "direct", "relay", "websocket"} {
		ways += got[`culvert_gateway_paths{path="`+way+`"}`]
	}
	if ways != 1 || got["culvert_gateway_bytes_up_total"] == 0 {
		t.Errorf("%v sessions with a way, %v bytes", ways, got["culvert_gateway_bytes_up_total"])
	}
}

// series are what the page shows without going over the page, which a busy machine may be late with: names with their labels.
func (w *world) series(t *testing.T) map[string]bool {
	t.Helper()
	families, err := w.gateway.metrics.registry(w.gateway).Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, f := range families {
		for _, m := range f.Metric {
			labels := ""
			for _, l := range m.Label {
				labels += fmt.Sprintf("{%s=%q}", l.GetName(), l.GetValue())
			}
			out[f.GetName()+labels] = true
		}
	}
	return out
}

// TestSeriesDoNotGrow: more sessions make no more series, and no label names one. What a series may count that a busy machine brings about, a
// lost stream say, goes by problem codes, of which there are as many as this program knows.
func TestSeriesDoNotGrow(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	w.join(nil)
	before := w.series(t)
	var ids []string
	for range 3 {
		j := w.join(nil)
		if err := j.usable(); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, j.offer.Session, j.offer.Addresses[0].String())
	}
	w.gateway.metrics.streamFailed("made-up") // the coordinator's word
	after := w.series(t)
	code := regexp.MustCompile(`^culvert_gateway_(refused|stream_failures)_total\{code="([a-z-]+)"\}$`)
	label := regexp.MustCompile(`^culvert_gateway_[a-z_]+(\{(path|cause|queue|verdict)="[^"]*"\})?$`)
	for name := range after {
		coded := code.FindStringSubmatch(name)
		if coded != nil && !problem.Code(coded[2]).Known() {
			t.Errorf("a code that anybody may make up: %s", name)
		}
		if coded == nil && !before[name] {
			t.Errorf("a new series: %s", name)
		}
		if coded == nil && strings.HasPrefix(name, "culvert_") && !label.MatchString(name) {
			t.Errorf("a series of another kind: %s", name)
		}
		for _, id := range ids {
			if strings.Contains(name, id) {
				t.Errorf("%s names a session", name)
			}
		}
	}
	if n := len(w.gateway.table.opened()); n != 4 {
		t.Errorf("%d sessions", n)
	}
}
