//go:build linux

package scale

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// stranger has an address of its own, which is no trusted proxy's.
const stranger = "127.0.0.2"

// What the stranger does, for as long as it does it.
const (
	badRate   = 20_000 // requests a second
	dawdlers  = 2_000  // connections whose headers never end
	badFor    = 10 * time.Second
	honestFor = "13s"
)

// BenchmarkHostile holds a coordinator that serves 100 joins a second against what one stranger's address can do: 20,000 requests a second
// that are refused, JSON without an end, and 2,000 connections whose headers do not come to an end. Once the stranger comes by itself,
// and once through a proxy that is trusted, whose connections are everybody's.
func BenchmarkHostile(b *testing.B) {
	b.Run("direct", func(b *testing.B) { hostile(b, stranger, "") })
	b.Run("proxied", func(b *testing.B) { hostile(b, "127.0.0.1", "203.0.112.66") })
}

// hostile has bad requests come from a local address, for another one where a proxy is in between.
func hostile(b *testing.B, from, behalf string) {
	n := alone(b)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	g := play(b, n.host, []*node{n}, "", "--rate", "100", "--duration", honestFor, "--renew-every", "5m")
	awaitJoins(b, n)
	idle, began, used := n.memory("VmRSS"), time.Now(), n.processor()
	p := newPest(b, n, from, behalf)
	var wg sync.WaitGroup
	for range dawdlers / dawdlersEach {
		wg.Go(func() { p.dawdle(ctx) })
	}
	wg.Go(func() { p.pester(ctx) })
	peak := 0.0
	for over := time.After(badFor); ctx.Err() == nil; {
		select {
		case <-over:
			cancel()
		case <-time.After(200 * time.Millisecond):
			peak = max(peak, n.memory("VmRSS"))
		}
	}
	took, used := time.Since(began).Seconds(), n.processor()-used
	wg.Wait()
	r := g.report()
	r.clean(b)
	last := r.Phases[len(r.Phases)-1]
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(p.answered+p.cut)/took, "bad-requests/s")
	b.ReportMetric(float64(p.answered)/took, "answered/s")
	b.ReportMetric(float64(p.cut)/took, "cut-off/s")
	b.ReportMetric(float64(p.opened)/took, "bad-connections/s")
	b.ReportMetric(last.P50, "honest-p50-ms")
	b.ReportMetric(last.P99, "honest-p99-ms")
	b.ReportMetric(used/took, "coordinator-cores")
	b.ReportMetric((peak-idle)/1e6, "RSS-above-idle-MB")
	b.ReportMetric(float64(r.KeyFetches), "key-fetches")
}

// awaitJoins waits until the generator has been served.
func awaitJoins(b *testing.B, n *node) {
	b.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if n.processor() > 0.5 { // the first joins have been
			return
		}
	}
	b.Fatal("nobody joins")
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// publishedKey is the id of a key that the issuer publishes: what it signs has to be looked at.
func publishedKey(b *testing.B, issuer string) string {
	b.Helper()
	var about struct {
		Keys string `json:"jwks_uri"`
	}
	var set struct {
		Keys []struct {
			ID string `json:"kid"`
		} `json:"keys"`
	}
	fetch := func(url string, into any) {
		resp, err := http.Get(url)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
			b.Fatal(err)
		}
	}
	fetch(strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration", &about)
	fetch(about.Keys, &set)
	if len(set.Keys) == 0 {
		b.Fatal("the issuer publishes no key")
	}
	return set.Keys[0].ID
}
