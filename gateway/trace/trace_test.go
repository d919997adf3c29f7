package trace

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newLog(t testing.TB, opts Options) *Log {
	t.Helper()
	l, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func flow(n int) wire.FlowRecord {
	return wire.FlowRecord{Flow: uint64(n), Session: "s", Proto: "tcp", Verdict: wire.FlowAllowed}
}

func denial(session string, addr string, port uint16) wire.FlowRecord {
	return wire.FlowRecord{
		Session: session, Proto: "tcp", Verdict: wire.FlowRefused, Reason: "not granted", Rule: "r",
		Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), port), Began: time.Now(), Count: 1,
	}
}

// all takes every batch that there is.
func all(l *Log) (out []wire.FlowRecord) {
	l.Flush()
	for {
		b, ok := l.Next()
		if !ok {
			return out
		}
		out = append(out, b.Records...)
		l.Acked(b.Seq)
	}
}

func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		woken := 0
		l := newLog(t, Options{Wake: func() { woken++ }})
		if _, ok := l.Next(); ok {
			t.Error("a batch of nothing")
		}
		l.Add(flow(1))
		l.Add(flow(2))
		if _, ok := l.Next(); ok {
			t.Error("a record did not wait for others")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		b, ok := l.Next()
		if !ok || woken != 1 || b.Seq != 1 || len(b.Records) != 2 || b.Records[1].Flow != 2 {
			t.Errorf("%+v, %v, woken %d times", b, ok, woken)
		}
		for i := range wire.MaxFlowRecords + 5 {
			l.Add(flow(i))
		}
		if b, ok = l.Next(); !ok || b.Seq != 2 || len(b.Records) != wire.MaxFlowRecords {
			t.Errorf("a full batch waits: %d records, %v", len(b.Records), ok)
		}
		if b, ok = l.Next(); !ok || len(b.Records) != 5 {
			t.Errorf("the rest: %d records, %v", len(b.Records), ok)
		}
		if st := l.Stats(); st.Unproven != 3 || st.Waiting != 0 || st.Records != wire.MaxFlowRecords+7 {
			t.Errorf("%+v", st)
		}
	})
}

// A batch comes again on a new stream until it is acknowledged, under its own number and unchanged.
func TestAcknowledgement(t *testing.T) {
	l := newLog(t, Options{Batches: 2})
	next := func() uint64 {
		l.Flush()
		b, ok := l.Next()
		if !ok {
			return 0
		}
		return b.Seq
	}
	for want := uint64(1); want <= 3; want++ {
		l.Add(flow(int(want)))
		if got := next(); want <= 2 && got != want || want == 3 && got != 0 {
			t.Errorf("batch %d, want %d", got, want)
		}
	}
	l.Again()
	if a, b := next(), next(); a != 1 || b != 2 {
		t.Errorf("after a new stream %d and %d", a, b)
	}
	l.Acked(1)
	if got := next(); got != 3 {
		t.Errorf("with room again: %d", got)
	}
	l.Again()
	l.Acked(99) // nothing has been sent on this stream yet
	if a, b := next(), next(); a != 2 || b != 3 {
		t.Errorf("a coordinator that acknowledges what it has not seen: %d and %d", a, b)
	}
	l.Acked(3)
	if st := l.Stats(); st.Unproven != 0 || st.Waiting != 0 {
		t.Errorf("%+v", st)
	}
}

func TestFlowsAreDroppedAndCounted(t *testing.T) {
	l := newLog(t, Options{Queue: 10})
	for i := range 15 {
		l.Add(flow(i))
	}
	l.Flush()
	b, _ := l.Next()
	if len(b.Records) != 10 || b.Dropped != 5 || l.Stats().Dropped != 5 {
		t.Errorf("%d records, %d dropped", len(b.Records), b.Dropped)
	}
}

func TestDenialsAddUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLog(t, Options{})
		for range 1000 {
			l.Add(denial("s", "10.0.0.1", 22))
			time.Sleep(time.Millisecond)
		}
		l.Add(denial("s", "10.0.0.1", 23))
		l.Add(denial("other", "10.0.0.1", 22))
		got := all(l)
		if len(got) != 3 || got[0].Count != 1000 || got[0].Addr.Port() != 22 || time.Duration(got[0].Lasted) != 999*time.Millisecond || got[0].Rule != "r" {
			t.Errorf("%+v", got)
		}
		l.Add(denial("s", "10.0.0.1", 22))
		if got := all(l); len(got) != 1 || got[0].Count != 1 {
			t.Errorf("what was sent is sent again: %+v", got)
		}
	})
}

// A port scan, a scan of names and a crowd of sessions lose detail, but no denial and no session before they must.
func TestScansLoseDetailAlone(t *testing.T) {
	l := newLog(t, Options{Denials: 100, Targets: 8})
	for port := range 1000 {
		l.Add(denial("ports", "10.0.0.1", uint16(port+1)))
	}
	for host := range 1000 {
		l.Add(denial("hosts", fmt.Sprintf("10.0.%d.%d", host/256, host%256), 22))
	}
	for i := range 1000 {
		r := denial("names", "0.0.0.0", 0)
		r.Addr, r.Proto, r.Name = netip.AddrPort{}, "dns", fmt.Sprintf("secret%d.evil.example", i)
		l.Add(r)
	}
	counts := map[string]uint64{}
	shapes := map[string]int{}
	for _, r := range all(l) {
		counts[r.Session] += r.Count
		shapes[r.Session]++
		if r.Session == "names" && r.Count > 1 && r.Name != "evil.example" {
			t.Errorf("names add up to %+v", r)
		}
		if r.Session == "ports" && r.Count > 1 && (r.Addr.Addr().String() != "10.0.0.1" || r.Addr.Port() != 0) {
			t.Errorf("ports add up to %+v", r)
		}
		if r.Session == "hosts" && r.Count > 1 && r.Reason != reasonSeveral {
			t.Errorf("hosts add up to %+v", r)
		}
	}
	for _, session := range []string{"ports", "hosts", "names"} {
		if counts[session] != 1000 || shapes[session] > 9 {
			t.Errorf("%s: %d denials in %d records", session, counts[session], shapes[session])
		}
	}
}

// Whatever is denied, in whatever order: every denial is in exactly one sum, and what waits is bounded.
func TestNoDenialIsLost(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		opts := Options{Queue: 5, Denials: rapid.IntRange(1, 6).Draw(rt, "denials"), Targets: rapid.IntRange(1, 4).Draw(rt, "targets"), Interval: time.Hour, Batches: 3}
		l, err := New(opts)
		if err != nil {
			rt.Fatal(err)
		}
		defer l.Close()
		var added, got uint64
		take := func() {
			l.Flush()
			if b, ok := l.Next(); ok {
				for _, r := range b.Records {
					got += r.Count
				}
				l.Acked(b.Seq)
			}
		}
		for range rapid.IntRange(0, 100).Draw(rt, "steps") {
			r := denial(rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"}).Draw(rt, "session"), "10.0.0.1", uint16(rapid.IntRange(1, 9).Draw(rt, "port")))
			r.Name = rapid.SampledFrom([]string{"", "a.x", "b.x", "c.y"}).Draw(rt, "name")
			r.Count = uint64(rapid.IntRange(1, 3).Draw(rt, "count"))
			l.Add(r)
			added += r.Count
			if n := l.Stats().Waiting; n > 2*opts.Denials+1 {
				rt.Fatalf("%d sums wait", n)
			}
			if rapid.IntRange(0, 9).Draw(rt, "take") == 0 {
				take()
			}
		}
		for l.Stats().Waiting > 0 {
			take()
		}
		if got != added || len(l.sums) != 0 || len(l.perID) != 0 {
			rt.Fatalf("%d denials of %d; %d sums and %d sessions are left", got, added, len(l.sums), len(l.perID))
		}
	})
}

func TestConcurrently(t *testing.T) {
	l := newLog(t, Options{Interval: time.Nanosecond})
	var adding sync.WaitGroup
	for i := range 4 {
		adding.Go(func() {
			for j := range 2000 {
				l.Add(flow(j))
				l.Add(denial(fmt.Sprint(i), "10.0.0.1", uint16(j%100+1)))
			}
		})
	}
	var denied, flows uint64
	done := make(chan struct{})
	go func() {
		adding.Wait()
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		for _, r := range all(l) {
			denied += r.Count
			if r.Count == 0 {
				flows++
			}
		}
	}
	if denied != 8000 || flows+l.Stats().Dropped != 8000 {
		t.Errorf("%d denials, %d flows, %d dropped", denied, flows, l.Stats().Dropped)
	}
}

func TestOptions(t *testing.T) {
	if _, err := New(Options{Queue: -1}); err == nil {
		t.Error("a negative limit was taken")
	}
}

func BenchmarkDenial(b *testing.B) {
	l := newLog(b, Options{})
	r := denial("s", "10.0.0.1", 22)
	b.ReportAllocs()
	for b.Loop() {
		l.Add(r)
	}
}
