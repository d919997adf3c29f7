package relay

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// DialOptions configure [Dial].
type DialOptions struct {
	URL string // of the relay: https://host/v1/relay, or http where nothing needs hiding

	// HTTP does the request, and with it proxies, roots, name resolution and dialling. Its Timeout must be 0, since it
	// would end the stream as well; ctx bounds the dialling. Defaults to one that uses the environment's proxies.
	HTTP *http.Client

	// Header is added to the request, for example User-Agent.
	Header http.Header

	FlowQueue int // bytes of one channel that may wait to be written; default [DefaultFlowQueue]
	Queue     int // bytes of all channels; default [DefaultQueue]
}

// Defaults of what may wait on one WebSocket, in bytes.
const (
	DefaultFlowQueue = 512 << 10
	DefaultQueue     = 8 << 20
)

// Validate fills defaults.
func (o *DialOptions) Validate() error {
	if o.URL == "" {
		return errors.New("a relay has no URL")
	}
	if o.HTTP == nil {
		o.HTTP = &http.Client{}
	}
	if o.HTTP.Timeout != 0 {
		return errors.New("the http client's timeout would end the relay's stream")
	}
	if o.FlowQueue == 0 {
		o.FlowQueue = DefaultFlowQueue
	}
	if o.Queue == 0 {
		o.Queue = max(DefaultQueue, o.FlowQueue)
	}
	if o.FlowQueue < 1<<16 || o.Queue < o.FlowQueue {
		return errors.New("a relay stream's queue takes at least 65536 bytes of a channel, and as many in all")
	}
	return nil
}

// Stream is a side's WebSocket to a relay. It may carry any number of sessions. Sending never blocks: packets wait in
// bounded queues, one for each channel, and a writer serves them in turn. One goroutine receives.
//
//	Dial ──► open ──► Close, the relay closes, or nothing is heard for 45 s ──► Receive gives an error
type Stream struct {
	socket *socket
	out    *outbox
	offer  Offer
	stop   chan struct{}
	once   sync.Once
	writer sync.WaitGroup
	buf    []byte // of Receive

	sent, received atomic.Uint64
}

// StreamStats count since the stream was opened.
type StreamStats struct {
	Sent     uint64 // bytes of messages written
	Received uint64 // bytes of messages received
	Dropped  uint64 // packets that found their queue full
}

// Dial opens a WebSocket to a relay and waits for its [Offer]. ctx bounds the dialling only.
func Dial(ctx context.Context, opts DialOptions) (*Stream, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	conn, below, err := upgrade(ctx, &opts)
	if err != nil {
		return nil, fmt.Errorf("open a websocket to relay %s: %w", opts.URL, err)
	}
	s := &Stream{
		socket: newSocket(conn, bufio.NewReader(conn), true).over(below),
		out:    newOutbox(opts.FlowQueue, opts.Queue),
		stop:   make(chan struct{}),
	}
	if err := s.hello(ctx); err != nil {
		_ = s.socket.close()
		return nil, fmt.Errorf("greet relay %s: %w", opts.URL, err)
	}
	s.writer.Go(s.write)
	return s, nil
}

// upgrade does the opening handshake (RFC 6455, section 4.1). It gives the connection below as well.
func upgrade(ctx context.Context, opts *DialOptions) (_ io.ReadWriteCloser, below net.Conn, err error) {
	var nonce [16]byte
	_, _ = rand.Read(nonce[:])
	key := base64.StdEncoding.EncodeToString(nonce[:])
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		below = i.Conn
		shortQueue(below)
	}})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, opts.URL, nil)
	if err != nil {
		return nil, nil, err
	}
	if opts.Header != nil {
		req.Header = opts.Header.Clone()
	}
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
		"Sec-WebSocket-Key": key, "Sec-WebSocket-Protocol": Protocol,
	} {
		req.Header.Set(name, value)
	}
	resp, err := opts.HTTP.Do(req)
	if err != nil {
		return nil, nil, err
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	switch {
	case resp.StatusCode != http.StatusSwitchingProtocols || !ok:
		err = fmt.Errorf("the server answered %s instead of a websocket", resp.Status)
	case resp.Header.Get("Sec-WebSocket-Accept") != acceptKey(key) || !headerHas(resp.Header, "Upgrade", "websocket") ||
		!headerHas(resp.Header, "Connection", "upgrade"):
		err = errors.New("the server did not complete the websocket handshake")
	case resp.Header.Get("Sec-WebSocket-Protocol") != Protocol || resp.Header.Get("Sec-WebSocket-Extensions") != "":
		err = errors.New("the server speaks another protocol over its websocket")
	default:
		return conn, below, nil
	}
	_ = resp.Body.Close()
	return nil, nil, err
}

func headerHas(h http.Header, name, token string) bool {
	for _, line := range h.Values(name) {
		for part := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(part), token) {
				return true
			}
		}
	}
	return false
}

// hello waits for the relay's first message.
func (s *Stream) hello(ctx context.Context) (err error) {
	defer context.AfterFunc(ctx, func() { _ = s.socket.close() })()
	if s.buf, err = s.socket.readMessage(nil); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	blocks, ok := WalkBlocks(s.buf), false
	if blocks.Next() && blocks.Segment == 0 {
		s.offer, ok = ParseOffer(blocks.Data)
	}
	if !ok {
		return fmt.Errorf("%w: it does not start with an offer", ErrBlock)
	}
	return nil
}

// Offer is what the relay gave for this connection. It stays valid as long as the stream is open.
func (s *Stream) Offer() Offer { return s.offer }

// Send queues packets of one channel, without their frame headers, and gives how many it took; the rest is dropped and
// counted. It copies them, never blocks and does not allocate in the long run. Any goroutine may call it.
func (s *Stream) Send(c Channel, packets [][]byte) (taken int) { return s.out.putPackets(c, packets) }

// Wait returns when a channel has room for another 64 KiB, the stream has ended, or limit has passed. Who waits before it sends has its
// senders notice that the way is slow, instead of losing their packets.
func (s *Stream) Wait(c Channel, limit time.Duration) {
	if s.out.room(c) == nil {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	s.out.wait(c, timer.C)
}

// SendSTUN queues one STUN message, such as a [Bind], ahead of all packets. It reports whether there was room.
func (s *Stream) SendSTUN(msg []byte) bool { return s.out.putControl(msg) }

// Receive waits for the next message, to be read with [WalkBlocks]. It is valid until the next call. After an error the
// stream is of no more use; close it.
func (s *Stream) Receive() (msg []byte, err error) {
	s.buf, err = s.socket.readMessage(s.buf)
	if err != nil {
		return nil, err
	}
	s.received.Add(uint64(len(s.buf)))
	return s.buf, nil
}

// write is the writer.
func (s *Stream) write() {
	defer s.out.close()
	if err := s.out.drain(s.socket, s.stop, &s.sent); err != nil {
		_ = s.socket.close() // which ends Receive
	}
}

// Stats gives the counters.
func (s *Stream) Stats() StreamStats {
	return StreamStats{Sent: s.sent.Load(), Received: s.received.Load(), Dropped: s.out.dropped.Load()}
}

// Close closes the stream at once and waits for its writer. What still waits is dropped. It may be called more than once.
func (s *Stream) Close() error {
	s.once.Do(func() { close(s.stop) })
	err := s.socket.bye(closeGoingAway, "")
	s.writer.Wait()
	return err
}

// shortQueue keeps the kernel from holding more unsent bytes of a connection than it needs, so that what waits does so
// in our queues, where it is served in turn.
func shortQueue(conn net.Conn) {
	if t := tcpOf(conn); t != nil {
		limitUnsent(t)
	}
}

// tcpOf gives the TCP connection below all others, nil where there is none.
func tcpOf(conn net.Conn) *net.TCPConn {
	for {
		above, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = above.NetConn()
	}
	t, _ := conn.(*net.TCPConn)
	return t
}
