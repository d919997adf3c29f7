//go:build linux

package scale

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// stranger has an address of its own.
const stranger = "127.0.0.2"

// BenchmarkHostile holds a coordinator that serves 100 joins a second against what one stranger's address can do: requests that are
// refused, as many as there is time for up to 20,000 a second, tokens with unknown keys, JSON without an end, and 2,000
// connections whose headers do not come to an end.
func BenchmarkHostile(b *testing.B) {
	n := alone(b)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	g := play(b, n.host, []*node{n}, "", "--rate", "100", "--duration", "16s", "--renew-every", "5m")
	awaitJoins(b, n)
	idle := n.memory("VmRSS")
	var sent atomic.Int64
	var wg sync.WaitGroup
	for range 2000 {
		wg.Go(func() { dawdle(ctx, n.addr) })
	}
	for i := range 16 {
		wg.Go(func() { pester(ctx, n.addr, n.issuer, i, &sent) })
	}
	began := time.Now()
	over := time.After(10 * time.Second)
	peak := 0.0
	for ended := false; !ended; {
		select {
		case <-over:
			ended = true
		case <-time.After(200 * time.Millisecond):
			peak = max(peak, n.memory("VmRSS"))
		}
	}
	took := time.Since(began).Seconds()
	cancel()
	wg.Wait()
	r := g.report()
	r.clean(b)
	p := r.Phases[len(r.Phases)-1]
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(sent.Load())/took, "bad-requests/s")
	b.ReportMetric(p.P50, "honest-p50-ms")
	b.ReportMetric(p.P99, "honest-p99-ms")
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

func dialAsStranger(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(stranger)}, Timeout: 5 * time.Second}
	return d.DialContext(ctx, "tcp", addr)
}

// dawdle opens a connection and sends a header's byte a second, again and again.
func dawdle(ctx context.Context, addr string) {
	for ctx.Err() == nil {
		conn, err := dialAsStranger(ctx, addr)
		if err != nil {
			sleep(ctx, time.Second)
			continue
		}
		_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: c\r\nX-A: b", wire.PathSessions)
		for err == nil && sleep(ctx, time.Second) {
			_, err = conn.Write([]byte("b"))
		}
		_ = conn.Close()
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// pester sends bad requests, 1,250 a second at most.
func pester(ctx context.Context, addr, issuer string, kind int, sent *atomic.Int64) {
	pause := time.NewTicker(800 * time.Microsecond)
	defer pause.Stop()
	var conn net.Conn
	var answers *bufio.Reader
	for ctx.Err() == nil {
		<-pause.C
		if conn == nil {
			var err error
			if conn, err = dialAsStranger(ctx, addr); err != nil {
				continue // counted as none
			}
			answers = bufio.NewReader(conn)
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		sent.Add(1)
		_, err := io.WriteString(conn, badRequest(kind, issuer))
		resp, rerr := (*http.Response)(nil), err
		if err == nil {
			resp, rerr = http.ReadResponse(answers, nil)
		}
		if rerr == nil {
			_, rerr = io.Copy(io.Discard, resp.Body)
		}
		if rerr != nil || resp.Close {
			_ = conn.Close()
			conn = nil
		}
	}
	if conn != nil {
		_ = conn.Close()
	}
}

// badRequest gives rubbish, JSON that never ends, or a token of a key that nobody has.
func badRequest(kind int, issuer string) string {
	body := "rubbish"
	switch kind % 4 {
	case 1:
		body = strings.Repeat(`{"a":`, 2000)
	case 2, 3:
		enc := base64.RawURLEncoding.EncodeToString
		now := time.Now().Unix()
		token := enc(fmt.Appendf(nil, `{"alg":"RS256","kid":"k%d","typ":"JWT"}`, time.Now().UnixNano())) + "." +
			enc(fmt.Appendf(nil, `{"iss":%q,"aud":"x","iat":%d,"exp":%d}`, issuer, now, now+300)) + "." + enc(make([]byte, 256))
		body = fmt.Sprintf(`{"network":"load","key":%q,"token":%q}`, wire.Key{1}, token)
	}
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: c\r\nContent-Length: %d\r\n\r\n%s", wire.PathSessions, len(body), body)
}
