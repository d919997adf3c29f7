package udpconn

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(tb testing.TB, opts Options) *Conn {
	tb.Helper()
	c, err := Listen(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}

// run makes n datagrams of size bytes, the last one shorter, in one piece. Each starts with its number.
func run(n, size int) []byte {
	b := make([]byte, 0, n*size)
	for i := range n {
		d := bytes.Repeat([]byte{byte(i)}, size)
		if i == n-1 {
			d = d[:size-1]
		}
		b = append(b, d...)
	}
	return b
}

// receive reads until it has total bytes and gives the datagrams, split.
func receive(tb testing.TB, c *Conn, total int) (datagrams [][]byte, last Datagram) {
	tb.Helper()
	stop := time.AfterFunc(time.Minute, func() { _ = c.Close() })
	defer stop.Stop()
	for b := c.NewBatch(8); total > 0; {
		if err := b.Read(); err != nil {
			tb.Fatalf("%d bytes are missing: %v", total, err)
		}
		for i := range b.Len() {
			last = b.Datagram(i)
			last.Data = bytes.Clone(last.Data)
			total -= len(last.Data)
			datagrams = slices.AppendSeq(datagrams, slices.Chunk(last.Data, max(1, last.Segment)))
		}
	}
	return datagrams, last
}

func TestRuns(t *testing.T) {
	for _, tt := range []struct{ name, network, bind, to string }{
		{"IPv4", "udp4", "127.0.0.1:0", "127.0.0.1"},
		{"IPv6", "udp6", "[::1]:0", "::1"},
		{"IPv4 on a socket of both", "udp", ":0", "127.0.0.1"},
		{"IPv6 on a socket of both", "udp", ":0", "::1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to := netip.MustParseAddr(tt.to)
			if to.Is6() && !hasIPv6() {
				t.Skip("no IPv6 here")
			}
			a, b := listen(t, Options{Network: tt.network, Addr: tt.bind}), listen(t, Options{Network: tt.network, Addr: tt.bind})
			for _, n := range []int{1, 2, 45, 64, 100} {
				data := run(n, 1400)
				q := a.NewQueue(4)
				q.Add(data, 1400, netip.AddrPortFrom(to, b.LocalAddr().Port()), netip.Addr{})
				q.Flush()
				got, last := receive(t, b, len(data))
				if len(got) != n || !bytes.Equal(slices.Concat(got...), data) || int(q.Sent) != n || q.Dropped != 0 {
					t.Fatalf("%d datagrams were sent as %d and dropped %d, %d arrived", n, q.Sent, q.Dropped, len(got))
				}
				if want := netip.AddrPortFrom(to, a.LocalAddr().Port()); last.From != want {
					t.Fatalf("they come from %s, not %s", last.From, want)
				}
				if wild := b.LocalAddr().Addr().IsUnspecified(); runtime.GOOS == "linux" && (wild && last.Local != to || !wild && last.Local.IsValid()) {
					t.Fatalf("they were sent to %s", last.Local)
				}
			}
		})
	}
}

func hasIPv6() bool {
	c, err := net.ListenPacket("udp6", "[::1]:0")
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

func TestQueueFlushesWhenFull(t *testing.T) {
	a, b := listen(t, Options{Addr: "127.0.0.1:0"}), listen(t, Options{Addr: "127.0.0.1:0"})
	q := a.NewQueue(2)
	for i := range 5 {
		q.Add([]byte{byte(i)}, 1, b.LocalAddr(), netip.Addr{})
	}
	q.Flush()
	q.Flush() // of nothing
	if got, _ := receive(t, b, 5); len(got) != 5 || q.Sent != 5 {
		t.Fatalf("%d arrived, %d were sent", len(got), q.Sent)
	}
}

func TestCloseEndsRead(t *testing.T) {
	c := listen(t, Options{Addr: "127.0.0.1:0"})
	got := make(chan error)
	go func() { got <- c.NewBatch(1).Read() }()
	_ = c.Close()
	if err := <-got; !errors.Is(err, net.ErrClosed) {
		t.Fatalf("got %v", err)
	}
	q := c.NewQueue(1)
	q.Add([]byte("x"), 1, c.LocalAddr(), netip.Addr{})
	q.Flush()
	if q.Dropped != 1 || q.Sent != 0 {
		t.Fatalf("a closed socket sent %d", q.Sent)
	}
}

func TestOptions(t *testing.T) {
	if _, err := Listen(t.Context(), Options{Buffer: -1}); err == nil {
		t.Error("a negative buffer passes")
	}
	if _, err := Listen(t.Context(), Options{Addr: "nonsense"}); err == nil {
		t.Error("a broken address passes")
	}
}
