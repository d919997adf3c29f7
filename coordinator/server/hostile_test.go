package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// from gives a client with one of loopback's addresses.
func from(t testing.TB, addr string) *http.Client {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
	c := &http.Client{Transport: &http.Transport{DialContext: d.DialContext, MaxIdleConnsPerHost: 64}, Timeout: 60 * time.Second}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

// honest joins so many jobs, one after the other, and fails where one does not get in.
func (r *rig) honest(jobs int) {
	r.t.Helper()
	for range jobs {
		r.job().mustJoin()
	}
}

// flood sends requests from one address with so many workers until it is stopped, and gives how many were answered in which way.
func flood(ctx context.Context, c *http.Client, workers int, request func() *http.Request) *sync.Map {
	var answers sync.Map
	count := func(what any) {
		n, _ := answers.LoadOrStore(what, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				resp, err := c.Do(request().WithContext(ctx))
				if err != nil {
					count("broken")
					continue
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				count(resp.StatusCode)
			}
		})
	}
	wg.Wait()
	return &answers
}

func answered(answers *sync.Map, what any) int64 {
	if n, ok := answers.Load(what); ok {
		return n.(*atomic.Int64).Load()
	}
	return 0
}

// under runs an attack from another address, and honest jobs meanwhile.
func (r *rig) under(attack func(ctx context.Context) *sync.Map, jobs int) *sync.Map {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	done := make(chan *sync.Map, 1)
	go func() { done <- attack(ctx) }()
	r.honest(jobs)
	cancel()
	return <-done
}

func (r *rig) post(body string) *http.Request {
	req, err := http.NewRequest(http.MethodPost, r.url()+wire.PathSessions, strings.NewReader(body))
	if err != nil {
		r.t.Error(err)
	}
	return req
}

// TestFloodOfBadTokens: an address whose tokens are not believed is soon not listened to; others do not notice, and what it sent is
// counted, not recorded.
func TestFloodOfBadTokens(t *testing.T) {
	r := newRig(t, Options{})
	r.opts.API.FailureRate, r.opts.API.FailureBurst = 1, 20
	r.stop()
	r.start()
	r.gateway()
	stranger, err := claimstest.New(r.issuer.URL()) // the same name, other keys
	if err != nil {
		t.Fatal(err)
	}
	j := r.job()
	bad := wire.Secret(stranger.Sign(wire.Audience(publicURL, j.key), j.claims))
	body, err := json.Marshal(wire.JoinRequest{Network: "corp", Key: j.key, Token: bad})
	if err != nil {
		t.Fatal(err)
	}
	fetched := r.issuer.Fetches()
	before := len(r.records())
	evil := from(t, "127.0.0.2")
	answers := r.under(func(ctx context.Context) *sync.Map {
		return flood(ctx, evil, 8, func() *http.Request { return r.post(string(body)) })
	}, 30)
	if n := answered(answers, http.StatusTooManyRequests); n == 0 {
		t.Error("the flood was never stopped")
	}
	if n := answered(answers, http.StatusUnauthorized); n < 1 || n > 200 {
		t.Errorf("%d bad tokens were looked at", n)
	}
	if n := r.issuer.Fetches() - fetched; n > 1 {
		t.Errorf("tokens with unknown keys made us fetch %d times", n)
	}
	if n := len(r.records()) - before; n != 30 {
		t.Errorf("%d records of 30 joins", n)
	}
	for range 100 { // a busy machine may have taken long enough for one more to be looked at
		resp, err := evil.Do(r.post(string(body)))
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusTooManyRequests && resp.Close {
			return
		}
	}
	t.Error("after the flood the next ones are looked at")
}

// TestFloodOfRequests: what comes over the rate of one address is refused before its body is read.
func TestFloodOfRequests(t *testing.T) {
	r := newRig(t, Options{})
	r.opts.API.Rate, r.opts.API.Burst = 1, 100 // the honest ones are 31
	r.stop()
	r.start()
	r.gateway()
	evil := from(t, "127.0.0.2")
	for name, body := range map[string]string{
		"rubbish": "rubbish", "nested": strings.Repeat("[", 60_000), "open": `{"token":"` + strings.Repeat("a", 60_000),
	} {
		answers := r.under(func(ctx context.Context) *sync.Map {
			return flood(ctx, evil, 8, func() *http.Request { return r.post(body) })
		}, 10)
		stopped := answered(answers, http.StatusTooManyRequests) > 0
		for range 300 { // on a busy machine the honest ones may be done before the flood has come to its limit
			if stopped {
				break
			}
			resp, err := evil.Do(r.post(body))
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			stopped = resp.StatusCode == http.StatusTooManyRequests
		}
		if !stopped || answered(answers, http.StatusOK) > 0 || answered(answers, http.StatusInternalServerError) > 0 {
			t.Errorf("%s: the flood was never stopped", name)
		}
	}
}

// endless is a body that goes on for as long as somebody reads it.
type endless struct{ sent atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, bytes.Repeat([]byte(`{"a":`), len(p)/5+1))
	e.sent.Add(int64(n))
	return n, nil
}

// TestEndlessJSON: of a body without an end no more than 64 KiB are read, and what the network holds.
func TestEndlessJSON(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	for range 3 {
		body := &endless{}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.url()+wire.PathSessions, body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := from(t, "127.0.0.2").Do(req)
		if err == nil { // else the connection was cut under the writer
			wantCode(t, problem.Read(resp), problem.TooLarge)
			_ = resp.Body.Close()
		}
		if n := body.sent.Load(); n > 64<<20 {
			t.Errorf("%d bytes were taken", n)
		}
		r.honest(1)
	}
}

// TestSlowLoris: connections that dawdle over their headers are closed when their time is over, and hold up nobody.
func TestSlowLoris(t *testing.T) {
	const conns = 500
	r := newRig(t, Options{})
	r.opts.HeaderTimeout = 2 * time.Second
	r.stop()
	r.start()
	r.gateway()
	open := make([]net.Conn, conns)
	for i := range open {
		open[i] = dialFrom(t, "127.0.0.2", r.server.Addr())
		if _, err := fmt.Fprintf(open[i], "POST %s HTTP/1.1\r\nHost: c\r\nX-A: b", wire.PathSessions); err != nil {
			t.Fatal(err)
		}
	}
	r.honest(20)
	r.eventually("the dawdlers are gone", func() bool { return r.server.conns.Open() < 50 })
	r.honest(1)
}

// TestTooManyConnections: one address may hold so many and no more; another one is not kept out by it.
func TestTooManyConnections(t *testing.T) {
	r := newRig(t, Options{})
	r.stop()
	r.write(r.doc + "limits: {address_connections: 10}\n")
	r.start()
	r.gateway()
	for range 10 {
		dialFrom(t, "127.0.0.2", r.server.Addr())
	}
	r.eventually("all are taken", func() bool { return r.server.conns.Open() >= 11 })
	if _, err := from(t, "127.0.0.2").Get(r.url() + "/healthz"); err == nil {
		t.Error("an eleventh connection was taken")
	}
	r.honest(3)
}

// dialFrom opens a connection from one of loopback's addresses.
func dialFrom(t testing.TB, from string, to net.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 30 * time.Second}
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
