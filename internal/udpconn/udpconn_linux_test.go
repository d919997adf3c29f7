package udpconn

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
)

// A run leaves in pieces that the kernel does not segment in software. What arrives on loopback is what was sent in one
// piece.
func TestRunsStayBelowTheKernelsLimit(t *testing.T) {
	a, b := listen(t, Options{Addr: "127.0.0.1:0"}), listen(t, Options{Addr: "127.0.0.1:0"})
	for _, size := range []int{1456, 1424, 1312, 576} {
		data := run(200, size)
		q, batch := a.NewQueue(8), b.NewBatch(8)
		q.Add(data, size, b.LocalAddr(), netip.Addr{})
		q.Flush()
		largest := 0
		for total := 0; total < len(data); {
			if err := batch.Read(); err != nil {
				t.Fatal(err)
			}
			for i := range batch.Len() {
				n := len(batch.Datagram(i).Data)
				largest, total = max(largest, n), total+n
			}
		}
		if want := min(MaxSegments, MaxRun/size) * size; largest != want {
			t.Errorf("size %d: the largest run has %d bytes, wanted %d", size, largest, want)
		}
	}
}

// Where nothing segments, a run leaves as single datagrams, and between others in order.
func TestWithoutSegmentation(t *testing.T) {
	a, b := listen(t, Options{Addr: ":0"}), listen(t, Options{Addr: "127.0.0.1:0"})
	a.gso.Store(false)
	data := run(10, 100)
	q := a.NewQueue(8)
	to, from := b.LocalAddr(), netip.MustParseAddr("127.0.0.9")
	q.Add([]byte("first"), 5, to, from)
	q.Add(data, 100, to, from)
	q.Add([]byte("last"), 4, to, from)
	q.Flush()
	got, last := receive(t, b, len(data)+9)
	if want := slices.Concat([]byte("first"), data, []byte("last")); len(got) != 12 || !bytes.Equal(slices.Concat(got...), want) {
		t.Fatalf("%d datagrams arrived", len(got))
	}
	if last.From.Addr() != from || q.Sent != 12 {
		t.Fatalf("%d were sent, the last from %s", q.Sent, last.From)
	}
}

// Who answers from a socket bound to all addresses answers from the one that was asked.
func TestAnswersFromTheAddressThatWasAsked(t *testing.T) {
	for _, network := range []string{"udp4", "udp"} {
		server, client := listen(t, Options{Network: network}), listen(t, Options{Addr: "127.0.0.1:0"})
		asked := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.7"), server.LocalAddr().Port())
		q := client.NewQueue(1)
		q.Add([]byte("question"), 8, asked, netip.Addr{})
		q.Flush()
		_, d := receive(t, server, 8)
		q = server.NewQueue(1)
		q.Add([]byte("answer"), 6, d.From, d.Local)
		q.Flush()
		if _, d = receive(t, client, 6); d.From != asked {
			t.Errorf("%s: the answer comes from %s, not %s", network, d.From, asked)
		}
	}
}

func TestOneSocketCannotReachTheOtherFamily(t *testing.T) {
	c := listen(t, Options{Network: "udp4", Addr: "127.0.0.1:0"})
	q := c.NewQueue(1)
	q.Add([]byte("x"), 1, netip.MustParseAddrPort("[::1]:9"), netip.Addr{})
	q.Add(make([]byte, 200), 100, netip.MustParseAddrPort("[::1]:9"), netip.Addr{})
	q.Flush()
	if q.Dropped != 3 || q.Sent != 0 {
		t.Fatalf("sent %d, dropped %d", q.Sent, q.Dropped)
	}
}

// Nobody gets a socket to send to all hosts of a network.
func TestNoBroadcasts(t *testing.T) {
	c := listen(t, Options{Network: "udp4", Addr: "127.0.0.1:0"})
	q := c.NewQueue(1)
	q.Add([]byte("x"), 1, netip.AddrPortFrom(netip.MustParseAddr("127.255.255.255"), c.LocalAddr().Port()), netip.Addr{})
	q.Flush()
	if q.Dropped != 1 || q.Sent != 0 {
		t.Errorf("sent %d, dropped %d", q.Sent, q.Dropped)
	}
}

// What the path cannot take is dropped alone.
func TestTooLargeIsDroppedAlone(t *testing.T) {
	a, b := listen(t, Options{Addr: "127.0.0.1:0"}), listen(t, Options{Addr: "127.0.0.1:0"})
	q := a.NewQueue(4)
	q.Add([]byte("one"), 3, b.LocalAddr(), netip.Addr{})
	q.Add(make([]byte, 1<<16), 1<<16, b.LocalAddr(), netip.Addr{}) // over any MTU
	q.Add([]byte("two"), 3, b.LocalAddr(), netip.Addr{})
	q.Flush()
	if got, _ := receive(t, b, 6); len(got) != 2 || q.Sent != 2 || q.Dropped != 1 {
		t.Fatalf("%d arrived, sent %d, dropped %d", len(got), q.Sent, q.Dropped)
	}
}

// What nobody reads is dropped by the kernel and counted; sending goes on.
func TestOverflowIsCounted(t *testing.T) {
	a, b := listen(t, Options{Addr: "127.0.0.1:0"}), listen(t, Options{Addr: "127.0.0.1:0", Buffer: 1 << 16})
	q, data := a.NewQueue(4), run(40, 1400)
	for range 100 {
		q.Add(data, 1400, b.LocalAddr(), netip.Addr{})
	}
	q.Flush()
	if s := b.Stats(); s.Overflow == 0 || s.ReceiveBuffer == 0 || s.SendBuffer == 0 {
		t.Fatalf("got %+v", s)
	}
}

func TestReusePort(t *testing.T) {
	a := listen(t, Options{Addr: "127.0.0.1:0", ReusePort: true})
	if _, err := Listen(t.Context(), Options{Addr: a.LocalAddr().String()}); err == nil {
		t.Error("a port is shared without asking")
	}
	b := listen(t, Options{Addr: a.LocalAddr().String(), ReusePort: true})
	if a.LocalAddr() != b.LocalAddr() {
		t.Fatalf("%s and %s", a.LocalAddr(), b.LocalAddr())
	}
}

func TestNothingAllocates(t *testing.T) {
	a, b := listen(t, Options{Addr: ":0"}), listen(t, Options{Addr: ":0"})
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), b.LocalAddr().Port())
	q, batch, data := a.NewQueue(4), b.NewBatch(4), run(10, 100)
	if n := testing.AllocsPerRun(100, func() {
		q.Add(data, 100, to, to.Addr())
		q.Flush()
		if err := batch.Read(); err != nil || batch.Datagram(0).Segment != 100 {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkForward(b *testing.B) {
	in, out, sink := listen(b, Options{Addr: "127.0.0.1:0"}), listen(b, Options{Addr: "127.0.0.1:0"}), listen(b, Options{Addr: "127.0.0.1:0"})
	src := out.NewQueue(1)
	q, batch, data := in.NewQueue(4), in.NewBatch(4), run(44, 1456)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		src.Add(data, 1456, in.LocalAddr(), netip.Addr{})
		src.Flush()
		if err := batch.Read(); err != nil {
			b.Fatal(err)
		}
		d := batch.Datagram(0)
		q.Add(d.Data, d.Segment, sink.LocalAddr(), netip.Addr{})
		q.Flush()
	}
}
