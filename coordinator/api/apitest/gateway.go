// Package apitest is a gateway for tests of the coordinator: a real WebSocket, a scripted mind.
package apitest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Options describe a gateway.
type Options struct {
	URL        string // the coordinator's base URL
	Client     *http.Client
	Network    string
	Credential string // the Authorization header's value
	Hello      wire.Hello
	Deaf       bool // never reads after the welcome
	// Answer is asked for each offer and renewal, in order; nil leaves it unanswered. Default: [Gateway.Accept].
	Answer func(g *Gateway, f wire.Frame) *wire.Answer
}

// Gateway is one stream to a coordinator.
type Gateway struct {
	Welcome wire.Welcome
	opts    Options
	conn    *websocket.Conn
	done    chan struct{} // closed when the stream is over

	mu     sync.Mutex
	err    error
	frames []wire.Frame
}

// Dial opens a stream and waits for its welcome. A refusal of the coordinator is its *problem.Error.
func Dial(ctx context.Context, opts Options) (*Gateway, error) {
	if opts.Answer == nil {
		opts.Answer = (*Gateway).Accept
	}
	header := http.Header{"Authorization": {opts.Credential}, wire.HeaderNetwork: {opts.Network}}
	conn, resp, err := websocket.Dial(ctx, strings.TrimRight(opts.URL, "/")+wire.PathGateway,
		&websocket.DialOptions{HTTPClient: opts.Client, HTTPHeader: header})
	if err != nil {
		if resp != nil && resp.StatusCode >= 400 {
			return nil, problem.Read(resp)
		}
		return nil, err
	}
	conn.SetReadLimit(wire.MaxState)
	g := &Gateway{opts: opts, conn: conn, done: make(chan struct{})}
	if err := g.greet(ctx); err != nil {
		_ = conn.CloseNow()
		return nil, err
	}
	if opts.Deaf {
		return g, nil
	}
	go g.read()
	return g, nil
}

func (g *Gateway) greet(ctx context.Context) error {
	if err := g.Send(ctx, wire.FrameHello, 0, g.opts.Hello); err != nil {
		return err
	}
	f, err := g.next(ctx)
	if err != nil {
		return err
	}
	if f.Type == wire.FrameAnswer {
		var a wire.Answer
		var p problem.Error
		if json.Unmarshal(f.Body, &a) == nil && json.Unmarshal(a.Problem, &p) == nil {
			return &p
		}
	}
	if f.Type != wire.FrameWelcome {
		return fmt.Errorf("got a %s frame, want a welcome", f.Type)
	}
	return json.Unmarshal(f.Body, &g.Welcome)
}

func (g *Gateway) next(ctx context.Context) (wire.Frame, error) {
	var f wire.Frame
	_, data, err := g.conn.Read(ctx)
	if err != nil {
		return f, err
	}
	return f, json.Unmarshal(data, &f)
}

func (g *Gateway) read() {
	defer close(g.done)
	for {
		f, err := g.next(context.Background())
		g.mu.Lock()
		if err != nil {
			g.err = err
			g.mu.Unlock()
			return
		}
		g.frames = append(g.frames, f)
		g.mu.Unlock()
		if f.Type == wire.FrameOffer || f.Type == wire.FrameRenew {
			if a := g.opts.Answer(g, f); a != nil {
				_ = g.Send(context.Background(), wire.FrameAnswer, f.ID, a)
			}
		}
	}
}

// Accept is the answer of a gateway that takes everything.
func (g *Gateway) Accept(f wire.Frame) *wire.Answer {
	now := time.Now()
	a := &wire.Answer{Lease: &wire.Lease{Expires: now.Add(9 * time.Minute), Ends: now.Add(time.Hour)}}
	if f.Type == wire.FrameOffer {
		a.Gateway = &wire.Gateway{Name: g.opts.Hello.Name, Key: g.opts.Hello.Key, Addresses: g.Welcome.Addresses, Candidates: g.opts.Hello.Candidates}
	}
	return a
}

// Send sends a frame.
func (g *Gateway) Send(ctx context.Context, t wire.FrameType, id uint64, body any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	data, err := json.Marshal(wire.Frame{Type: t, ID: id, Body: raw})
	if err != nil {
		return err
	}
	return g.conn.Write(ctx, websocket.MessageText, data)
}

// SendRaw sends bytes as they are.
func (g *Gateway) SendRaw(ctx context.Context, data []byte) error {
	return g.conn.Write(ctx, websocket.MessageText, data)
}

// Frames gives the frames of a type that came so far.
func (g *Gateway) Frames(t wire.FrameType) []wire.Frame {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []wire.Frame
	for _, f := range g.frames {
		if f.Type == t {
			out = append(out, f)
		}
	}
	return out
}

// Done is closed when the stream is over; Err says why.
func (g *Gateway) Done() <-chan struct{} { return g.done }

// Err is why the stream is over.
func (g *Gateway) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// Close ends the stream in good order and waits.
func (g *Gateway) Close() {
	_ = g.conn.Close(websocket.StatusNormalClosure, "the test is over")
	if !g.opts.Deaf {
		<-g.done
	}
}

// Cut ends the stream as a crash does, and waits.
func (g *Gateway) Cut() {
	_ = g.conn.CloseNow()
	if !g.opts.Deaf {
		<-g.done
	}
}
