package netcheck

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
)

// atOnce is how many WebSockets are opened at the same time: more would disturb each other's figures.
const atOnce = 4

// pingTimeout is how long one answer to a ping is waited for.
const pingTimeout = 2 * time.Second

// webSockets opens one to every relay that has any, and measures a round trip on each.
func (c *checker) webSockets(ctx context.Context) {
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, r := range c.info.Relays {
		if r.URL == "" {
			continue
		}
		way := &Way{To: Printable(r.URL)}
		c.report.Relays[i].WebSocket = way
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			rtt, err := PingRelay(ctx, c.Transport, r.URL, c.InsecureHTTP)
			if err != nil {
				way.Error = Printable(Explain(r.URL, err).Message)
				return
			}
			way.Works, way.RTT = true, milliseconds(rtt)
		})
	}
	wg.Wait()
}

// PingRelay opens a WebSocket to a relay, waits for what a relay says first, and gives the round trip of a ping.
func PingRelay(ctx context.Context, transport http.RoundTripper, address string, insecure bool) (time.Duration, error) {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http" {
		return 0, problem.New(problem.Incompatible, "the relay's URL is none", "correct it in the coordinator's file")
	}
	if u.Scheme == "http" && !insecure && !loopback(u.Hostname()) {
		return 0, problem.New(problem.Usage, "the relay's URL is plain http", "use https, or say --insecure-http if you mean it")
	}
	ctx, cancel := context.WithTimeout(ctx, httpTimeout)
	defer cancel()
	conn, resp, err := websocket.Dial(ctx, address, &websocket.DialOptions{
		HTTPClient:   &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		Subprotocols: []string{relay.Protocol},
	})
	if err != nil {
		if resp != nil && resp.StatusCode >= 400 && resp.Body != nil {
			return 0, problem.Read(resp)
		}
		return 0, err
	}
	defer func() { _ = conn.CloseNow() }()
	if err := greeted(ctx, conn); err != nil {
		return 0, err
	}
	best, err := ping(conn.CloseRead(ctx), conn) // it reads on, which a ping needs
	if err == nil {
		_ = conn.Close(websocket.StatusNormalClosure, "")
	}
	return best, err
}

// ping gives the fastest of some round trips. One may go unanswered.
func ping(ctx context.Context, conn *websocket.Conn) (best time.Duration, err error) {
	for range samples {
		one, cancel := context.WithTimeout(ctx, pingTimeout)
		started := time.Now()
		e := conn.Ping(one)
		rtt := time.Since(started)
		cancel()
		switch {
		case e != nil:
			err = fmt.Errorf("ping: %w", e)
		case best == 0 || rtt < best:
			best = rtt
		}
	}
	if best > 0 {
		err = nil
	}
	return best, err
}

// greeted waits for a relay's first message.
func greeted(ctx context.Context, conn *websocket.Conn) error {
	if conn.Subprotocol() != relay.Protocol {
		return problem.New(problem.Incompatible, "what answers there is no relay", "check the relay's URL in the coordinator's file")
	}
	conn.SetReadLimit(4 << 10)
	kind, msg, err := conn.Read(ctx)
	if err != nil {
		return fmt.Errorf("wait for the relay: %w", err)
	}
	blocks := relay.WalkBlocks(msg)
	if kind == websocket.MessageBinary && blocks.Next() && blocks.Segment == 0 {
		if _, ok := relay.ParseOffer(blocks.Data); ok {
			return nil
		}
	}
	return errors.Join(problem.New(problem.Incompatible, "the relay speaks another version", "update relay and client to the same version"), blocks.Err)
}
