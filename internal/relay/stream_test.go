package relay

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/nat"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// echo is a server that greets like a relay and sends every message back.
func echo(t *testing.T, start func(http.Handler) *httptest.Server) *httptest.Server {
	t.Helper()
	offer := testOffer(t)
	var open sync.WaitGroup
	server := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		open.Add(1)
		defer open.Done()
		s, err := acceptSocket(w, r)
		if err != nil {
			return
		}
		defer s.close()
		hello := AppendHello(nil, nat.TxID{}, offer)
		msg := AppendBlockHeader(make([]byte, headroom), len(hello), 0)
		for buf := []byte(nil); ; {
			if err := s.writeMessage(append(msg, hello...)); err != nil {
				return
			}
			if buf, err = s.readMessage(buf); err != nil {
				return
			}
			msg, hello = append(make([]byte, headroom), buf...), nil
		}
	}))
	t.Cleanup(func() { server.Close(); open.Wait() })
	return server
}

// fast fails a test that hangs, on a machine however busy.
func fast(t *testing.T) context.Context {
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(stop)
	return ctx
}

func TestStream(t *testing.T) {
	for name, start := range map[string]func(http.Handler) *httptest.Server{
		"plain": httptest.NewServer, "TLS": httptest.NewTLSServer,
		"TLS with HTTP/2": func(h http.Handler) *httptest.Server {
			s := httptest.NewUnstartedServer(h)
			s.EnableHTTP2 = true
			s.StartTLS()
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := echo(t, start)
			s, err := Dial(fast(t), DialOptions{URL: server.URL, HTTP: server.Client()})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if s.Offer() != testOffer(t) {
				t.Fatalf("offers %+v", s.Offer())
			}
			roundTrip(t, s)
		})
	}
}

// roundTrip sends packets of two channels and wants them back.
func roundTrip(t *testing.T, s *Stream) {
	t.Helper()
	stun := WantRequest(nat.TxID{5})
	if !s.SendSTUN(stun) {
		t.Fatal("no room for a STUN message")
	}
	var want [2][]byte
	for i := range 40 {
		p := bytes.Repeat([]byte{byte(i)}, 1000+i/20)
		if s.Send(Channel(i%2), [][]byte{p}) != 1 {
			t.Fatal("no room for a packet")
		}
		want[i%2] = append(want[i%2], p...)
	}
	var got [2][]byte
	for sawSTUN := false; !sawSTUN || len(got[0]) < len(want[0]) || len(got[1]) < len(want[1]); {
		msg, err := s.Receive()
		if err != nil {
			t.Fatal(err)
		}
		b := WalkBlocks(msg)
		for b.Next() {
			sawSTUN = sawSTUN || b.Segment == 0 && bytes.Equal(b.Data, stun)
			for f := b.Frames(); f.Next(); {
				got[f.Channel] = append(got[f.Channel], f.Packet...)
			}
		}
	}
	if !bytes.Equal(got[0], want[0]) || !bytes.Equal(got[1], want[1]) {
		t.Fatal("the packets changed on the way")
	}
	if st := s.Stats(); st.Sent != st.Received || st.Dropped != 0 {
		t.Fatalf("counts %+v", st)
	}
}

func TestStreamSendNeverBlocks(t *testing.T) {
	stuck := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := acceptSocket(w, r)
		if err != nil {
			return
		}
		defer s.close()
		hello := AppendHello(nil, nat.TxID{}, testOffer(t))
		_ = s.writeMessage(append(AppendBlockHeader(make([]byte, headroom), len(hello), 0), hello...))
		<-stuck // and never reads
	}))
	defer server.Close()
	defer close(stuck)
	s, err := Dial(fast(t), DialOptions{URL: server.URL, HTTP: server.Client()})
	if err != nil {
		t.Fatal(err)
	}
	packets := make([][]byte, 128)
	for i := range packets {
		packets[i] = make([]byte, 1452)
	}
	for s.Stats().Dropped < 100_000 {
		s.Send(1, packets)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Receive(); err == nil {
		t.Fatal("a closed stream receives")
	}
}

func TestDialRefuses(t *testing.T) {
	answers := map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"no relay":        {http.NotFound, "404 Not Found"},
		"half an upgrade": {func(w http.ResponseWriter, _ *http.Request) { hijackAnswer(w, "") }, "did not complete"},
		"another protocol": {func(w http.ResponseWriter, r *http.Request) {
			hijackAnswer(w, "Sec-WebSocket-Accept: "+acceptKey(r.Header.Get("Sec-WebSocket-Key"))+"\r\n")
		}, "another protocol"},
		"no offer": {func(w http.ResponseWriter, r *http.Request) {
			if s, err := acceptSocket(w, r); err == nil {
				_ = s.writeMessage(append(AppendBlockHeader(make([]byte, headroom), 1, 5), 1, 2, 3, 4, 5))
				_ = s.close()
			}
		}, "malformed"},
		"closes": {func(w http.ResponseWriter, r *http.Request) {
			if s, err := acceptSocket(w, r); err == nil {
				_ = s.bye(closePolicy, "no")
			}
		}, "the other side closed"},
	}
	for name, tt := range answers {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(tt.handler)
			defer server.Close()
			_, err := Dial(fast(t), DialOptions{URL: server.URL, HTTP: server.Client()})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := Dial(t.Context(), DialOptions{}); err == nil {
		t.Error("no URL passes")
	}
	if _, err := Dial(t.Context(), DialOptions{URL: "http://127.0.0.1:1", HTTP: &http.Client{Timeout: 1}}); err == nil {
		t.Error("a client that would end the stream passes")
	}
}

func hijackAnswer(w http.ResponseWriter, header string) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_, _ = conn.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + header + "\r\n"))
		_ = conn.Close()
	}
}

// Dialling ends with its context, also while the relay keeps silent; an open stream outlives it.
func TestDialsContext(t *testing.T) {
	silent := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s, err := acceptSocket(w, r); err == nil {
			<-silent
			_ = s.close()
		}
	}))
	defer server.Close()
	defer close(silent)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, DialOptions{URL: server.URL, HTTP: server.Client()}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	ctx, cancel = context.WithCancel(fast(t))
	echoing := echo(t, httptest.NewServer)
	s, err := Dial(ctx, DialOptions{URL: echoing.URL, HTTP: echoing.Client()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cancel()
	roundTrip(t, s)
}

func TestAcceptRefuses(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s, err := acceptSocket(w, r); err == nil {
			_ = s.close()
		}
	}))
	defer server.Close()
	good := map[string]string{
		"Connection": "keep-alive, Upgrade", "Upgrade": "WebSocket", "Sec-WebSocket-Version": "13",
		"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "x, " + Protocol,
	}
	tests := []struct {
		method, header, value string
		want                  int
	}{
		{"GET", "X", "", http.StatusSwitchingProtocols},
		{"POST", "X", "", http.StatusMethodNotAllowed},
		{"GET", "Upgrade", "h2c", http.StatusUpgradeRequired},
		{"GET", "Connection", "close", http.StatusUpgradeRequired},
		{"GET", "Sec-WebSocket-Version", "8", http.StatusUpgradeRequired},
		{"GET", "Sec-WebSocket-Key", "x", http.StatusBadRequest},
		{"GET", "Sec-WebSocket-Protocol", "chat", http.StatusBadRequest},
		{"GET", "Origin", "https://evil.example.com", http.StatusForbidden},
	}
	for _, tt := range tests {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range good {
			req.Header.Set(k, v)
		}
		req.Header.Set(tt.header, tt.value)
		if tt.value == "" {
			req.Header.Del(tt.header)
		}
		resp, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s with %s %q: %s", tt.method, tt.header, tt.value, resp.Status)
		}
		if tt.want == http.StatusSwitchingProtocols && resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
			t.Errorf("not the key of RFC 6455, section 1.3: %q", resp.Header.Get("Sec-WebSocket-Accept"))
		}
	}
}

// A ping that comes while a message is being written is answered once that is done.
func TestPingDuringAWriteIsAnswered(t *testing.T) {
	here, there := net.Pipe() // a write waits until the other end has read it
	s := newSocket(there, bufio.NewReader(there), false)
	var wait sync.WaitGroup
	wait.Go(func() { _, _ = s.readMessage(nil) })
	wait.Go(func() { _ = s.writeMessage(make([]byte, headroom+1000)) })
	first := make([]byte, 1)
	if _, err := io.ReadFull(here, first); err != nil { // the message is on its way, and stuck
		t.Fatal(err)
	}
	ping := []byte{finBit | opPing, maskBit | 4, 0, 0, 0, 0, 'w', 'o', 'r', 'd'}
	if _, err := here.Write(ping); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, 3+1000)
	if _, err := io.ReadFull(here, rest); err != nil {
		t.Fatal(err)
	}
	_ = here.SetReadDeadline(time.Now().Add(30 * time.Second))
	pong := make([]byte, 6)
	if _, err := io.ReadFull(here, pong); err != nil || string(pong) != string([]byte{finBit | opPong, 4})+"word" {
		t.Errorf("got %q, %v", pong, err)
	}
	_, _ = here.Close(), s.close()
	wait.Wait()
}
