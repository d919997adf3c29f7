package relay

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener whose connections are pipes, so that time can be faked around them.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	a, b := net.Pipe()
	p.conns <- b
	return a, nil
}

// bubble runs a relay without UDP in a synctest bubble, where dial opens a connection to it.
func bubble(t *testing.T, test func(t *testing.T, s *Server, dial func() net.Conn, client *http.Client)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(t.Context(), Options{Keys: signers()})
		if err != nil {
			t.Fatal(err)
		}
		p := newPipes()
		server := &http.Server{Handler: s}
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(p) })
		client := &http.Client{Transport: &http.Transport{DialContext: p.dial}}
		defer func() {
			_ = s.Close()
			_ = server.Close()
			serving.Wait()
			client.CloseIdleConnections()
		}()
		test(t, s, func() net.Conn { c, _ := p.dial(t.Context(), "", ""); return c }, client)
	})
}

func TestAnUnboundWebSocketIsClosed(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
		start := time.Now()
		stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		if _, err := stream.Receive(); !errors.Is(err, errClosed) {
			t.Fatalf("got %v", err)
		}
		if took := time.Since(start); took != BindTimeout {
			t.Fatalf("after %s", took)
		}
		synctest.Wait()
		if s.Stats().Links != 0 || len(s.unbound) != 0 {
			t.Fatal("it is still counted")
		}
	})
}

func TestABoundWebSocketStaysAndAnUnboundOneDoesNot(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
		stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		e, session := &streamEnd{tb: t, Stream: stream}, newTalk(t)
		mustBind(t, e, session, Client)
		unbound := time.Now().Add(IdleLife - time.Minute)
		stop := time.AfterFunc(IdleLife-time.Minute, func() {
			msg, _ := bindMessage(t, session, Client, stream.Offer(), func(b *Bind) { b.Unbind = true })
			stream.SendSTUN(msg)
		})
		defer stop.Stop()
		if _, err := stream.Receive(); err != nil { // the answer, after many pings
			t.Fatal(err)
		}
		if _, err := stream.Receive(); !errors.Is(err, errClosed) || time.Since(unbound) != BindTimeout {
			t.Fatalf("after %s: %v", time.Since(unbound), err)
		}
	})
}

// A side that says nothing is forgotten, and so is one whose ticket has ended; its WebSocket is lonely then.
func TestBindingsEnd(t *testing.T) {
	for name, tt := range map[string]struct{ ticket, busy, want time.Duration }{
		"silent":             {time.Hour, 0, IdleLife},
		"silent in the end":  {time.Hour, 25 * time.Minute, 25*time.Minute + IdleLife},
		"the ticket's end":   {5 * time.Minute, time.Hour, 5 * time.Minute},
		"the ticket's end 2": {30 * time.Minute, time.Hour, 30 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
				stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
				if err != nil {
					t.Fatal(err)
				}
				defer stream.Close()
				start := time.Now()
				e, session := &streamEnd{tb: t, Stream: stream}, newTalk(t)
				bind(t, e, session, Client, func(b *Bind) {
					b.Ticket = session.ticket(t, Client, func(c *Claims) { c.Expires = start.Add(tt.ticket) })
				})
				ctx, stop := context.WithTimeout(t.Context(), tt.busy)
				defer stop()
				var speaker sync.WaitGroup
				defer speaker.Wait()
				defer stop()
				speaker.Go(func() {
					for ctx.Err() == nil {
						stream.Send(session.channel, [][]byte{{1}})
						select {
						case <-ctx.Done():
						case <-time.After(time.Minute):
						}
					}
				})
				if _, err := stream.Receive(); !errors.Is(err, errClosed) {
					t.Fatal(err)
				}
				ended := time.Since(start) - BindTimeout
				if ended < tt.want-time.Minute || ended > tt.want+expireEvery {
					t.Fatalf("forgotten after %s, not %s", ended, tt.want)
				}
				if n := s.Stats().Sessions; n != 0 {
					t.Fatalf("%d sessions are left", n)
				}
			})
		})
	}
}

// A ticket's end counts to the moment, not only when the table is looked through.
func TestNothingMovesAfterATicketsEnd(t *testing.T) {
	for _, ended := range []Side{Client, Gateway} {
		bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
			session := newTalk(t)
			var ends [2]*streamEnd
			for side := range ends {
				stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
				if err != nil {
					t.Fatal(err)
				}
				defer stream.Close()
				ends[side] = &streamEnd{tb: t, Stream: stream}
				bind(t, ends[side], session, Side(side), func(b *Bind) {
					b.Ticket = session.ticket(t, Side(side), func(c *Claims) {
						if Side(side) == ended {
							c.Expires = time.Now().Add(5 * time.Second)
						}
					})
				})
			}
			silent(t, ends[Client], ends[Gateway], session)
			silent(t, ends[Gateway], ends[Client], session)
			time.Sleep(5 * time.Second)
			ends[Client].frames(session.channel, []byte("late"))
			ends[Gateway].frames(session.channel, []byte("late"))
			synctest.Wait()
			if st := s.Stats(); st.Packets != 2 || st.Alone != 1 || st.Strangers != 1 {
				t.Fatalf("counts %+v", st)
			}
		})
	}
}

// A server pings, and gives up on who says nothing; so does a client.
func TestSilentWebSocketsEnd(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, dial func() net.Conn, _ *http.Client) {
		conn := dial()
		defer conn.Close()
		request := "GET / HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: " + Protocol + "\r\n\r\n"
		go func() { _, _ = conn.Write([]byte(request)) }()
		in := bufio.NewReader(conn)
		if _, err := http.ReadResponse(in, nil); err != nil {
			t.Fatal(err)
		}
		for l := range s.links { // bound, as far as its timer goes
			synctest.Wait()
			l.lonely.Stop()
		}
		start, pings := time.Now(), 0
		socket := newSocket(conn, in, true)
		defer socket.close()
		for {
			h, err := socket.readHeader()
			if err != nil {
				break
			}
			if h.op == opPing {
				pings++
			}
			if _, err := in.Discard(int(h.size)); err != nil {
				break
			}
		}
		if took := time.Since(start); took != deadAfter || pings < 2 {
			t.Fatalf("after %s and %d pings", took, pings)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		defer b.Close()
		start := time.Now()
		if _, err := newSocket(a, bufio.NewReader(a), true).readMessage(nil); err == nil || time.Since(start) != deadAfter {
			t.Fatalf("after %s: %v", time.Since(start), err)
		}
	})
}

func TestNoncesLiveOneToTwoLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(t.Context(), Options{Keys: signers()})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		a, b := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("192.0.2.1:1001")
		n := s.nonces.give(a)
		for step, good := range []bool{true, true, false} {
			if s.nonces.valid(a, n) != good || s.nonces.valid(b, n) {
				t.Fatalf("after %d lives", step)
			}
			time.Sleep(NonceLife)
			synctest.Wait()
		}
	})
}

func TestMeter(t *testing.T) {
	var m meter
	now := time.Now().UnixNano()
	const rate, burst = 1000, time.Second
	take := func(n int) (ok bool) { return m.take(n, rate, burst, now) }
	if !take(1000) || take(1) {
		t.Fatal("a burst is a second's worth")
	}
	now += int64(time.Second / 2)
	if !take(500) || take(1) {
		t.Fatal("half a second gives half of it")
	}
	now += int64(time.Hour)
	if !take(1000) || take(1) {
		t.Fatal("an hour gives no more than a burst")
	}
	var sum int
	for range 10_000 {
		now += int64(time.Millisecond)
		if take(7) {
			sum += 7
		}
	}
	if sum < 9_990 || sum > 11_000 {
		t.Fatalf("%d in ten seconds", sum)
	}
}
