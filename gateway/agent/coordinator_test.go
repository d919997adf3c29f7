package agent

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// coordinator is a scripted one, which may lie. It listens on loopback and can be stopped and started again at its address.
type coordinator struct {
	t    testing.TB
	addr string
	// hellos get each gateway's hello, frames what follows but answers.
	hellos chan wire.Hello
	frames chan wire.Frame

	mu      sync.Mutex
	welcome wire.Welcome
	refuse  error  // answers the dial with this problem
	raw     []byte // sent in place of the welcome
	server  *http.Server
	conn    *websocket.Conn
	ended   chan websocket.StatusCode // how each stream was closed
	dials   int
	headers http.Header
	next    uint64
	waiting map[uint64]chan wire.Answer
	wg      sync.WaitGroup
}

func startCoordinator(t testing.TB) *coordinator {
	c := &coordinator{
		t: t, addr: "127.0.0.1:0", hellos: make(chan wire.Hello, 16), frames: make(chan wire.Frame, 1<<16), waiting: map[uint64]chan wire.Answer{}, ended: make(chan websocket.StatusCode, 64),
		welcome: wire.Welcome{Version: wire.Version, Network: "corp", Addresses: gatewayAddrs},
	}
	c.start()
	t.Cleanup(c.stop)
	return c
}

func (c *coordinator) url() string { return "http://" + c.addr }

func (c *coordinator) start() {
	l, err := net.Listen("tcp", c.addr)
	if err != nil {
		c.t.Fatal(err)
	}
	c.addr = l.Addr().String()
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathGateway, c.serve)
	c.server = &http.Server{Handler: mux}
	c.wg.Go(func() { _ = c.server.Serve(l) })
}

// stop dies without a word, as after kill -9.
func (c *coordinator) stop() {
	_ = c.server.Close()
	c.drop()
	c.wg.Wait()
}

// drop cuts the stream.
func (c *coordinator) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		_ = c.conn.CloseNow()
	}
}

// script changes what the next gateway is told.
func (c *coordinator) script(change func(*coordinator)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

func (c *coordinator) serve(w http.ResponseWriter, r *http.Request) {
	c.wg.Add(1)
	defer c.wg.Done()
	c.mu.Lock()
	c.dials++
	c.headers = r.Header.Clone()
	refuse, welcome, raw := c.refuse, c.welcome, c.raw
	c.mu.Unlock()
	if refuse != nil {
		problem.Write(w, refuse)
		return
	}
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(wire.MaxFrame)
	ctx := context.Background()
	var f wire.Frame
	if wsjson.Read(ctx, conn, &f) != nil || f.Type != wire.FrameHello {
		c.t.Errorf("a stream begins with %q", f.Type)
		return
	}
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	if raw != nil {
		_ = conn.Write(ctx, websocket.MessageText, raw)
	} else {
		_ = wsjson.Write(ctx, conn, frame(wire.FrameWelcome, 0, welcome))
	}
	// Only now may a test send: a gateway leaves a coordinator that does not begin with a welcome.
	c.hellos <- body[wire.Hello](c.t, f)
	c.read(ctx, conn)
}

func (c *coordinator) read(ctx context.Context, conn *websocket.Conn) {
	for {
		var f wire.Frame
		if err := wsjson.Read(ctx, conn, &f); err != nil {
			c.ended <- websocket.CloseStatus(err)
			return
		}
		if f.Type != wire.FrameAnswer {
			c.frames <- f
			continue
		}
		c.mu.Lock()
		if ch := c.waiting[f.ID]; ch != nil {
			ch <- body[wire.Answer](c.t, f)
			delete(c.waiting, f.ID)
		}
		c.mu.Unlock()
	}
}

// send sends a frame to the gateway.
func (c *coordinator) send(f wire.Frame) {
	c.t.Helper()
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if err := wsjson.Write(context.Background(), conn, f); err != nil {
		c.t.Errorf("send %s: %v", f.Type, err)
	}
}

// ask sends a frame that is answered, and waits.
func (c *coordinator) ask(kind wire.FrameType, v any) (wire.Answer, error) {
	c.t.Helper()
	ch := make(chan wire.Answer, 1)
	c.mu.Lock()
	c.next++
	id := c.next
	c.waiting[id] = ch
	c.mu.Unlock()
	c.send(frame(kind, id, v))
	select {
	case a := <-ch:
		if a.Problem == nil {
			return a, nil
		}
		var p problem.Error
		if err := json.Unmarshal(a.Problem, &p); err != nil {
			c.t.Errorf("the problem %s: %v", a.Problem, err)
		}
		return a, &p
	case <-time.After(40 * time.Second):
		c.t.Fatal("no answer within 40 s")
		return wire.Answer{}, nil
	}
}

// closed waits for a stream to be over and says how.
func (c *coordinator) closed() websocket.StatusCode {
	c.t.Helper()
	select {
	case code := <-c.ended:
		return code
	case <-time.After(40 * time.Second):
		c.t.Fatal("the stream is not closed within 40 s")
		return 0
	}
}

// hello waits for the next gateway.
func (c *coordinator) hello() wire.Hello {
	c.t.Helper()
	select {
	case h := <-c.hellos:
		return h
	case <-time.After(40 * time.Second):
		c.t.Fatal("no gateway within 40 s")
		return wire.Hello{}
	}
}

// expect waits for a frame of one of these kinds, passing over others.
func (c *coordinator) expect(kinds ...wire.FrameType) wire.Frame {
	c.t.Helper()
	for deadline := time.After(40 * time.Second); ; {
		select {
		case f := <-c.frames:
			if slices.Contains(kinds, f.Type) {
				return f
			}
		case <-deadline:
			c.t.Fatalf("no %v within 40 s", kinds)
		}
	}
}
