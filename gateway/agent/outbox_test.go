package agent

import (
	"context"
	"encoding/json"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

func drain(o *outbox) (out []wire.Frame) {
	for {
		f, ok := o.take()
		if !ok {
			return out
		}
		out = append(out, f)
	}
}

func body[T any](t testing.TB, f wire.Frame) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(f.Body, &v); err != nil {
		t.Fatalf("%s frame: %v", f.Type, err)
	}
	return v
}

func TestOutboxKeepsRenewalsWithoutAStream(t *testing.T) {
	o := newOutbox()
	o.answer(1, wire.Answer{})
	o.end(wire.End{Session: "a"})
	o.setCandidates([]wire.Candidate{{}}, wire.MappingEasy)
	o.renew(wire.Renewed{Session: "a", Token: "old"})
	o.renew(wire.Renewed{Session: "a", Token: "new"})
	o.renew(wire.Renewed{Session: "b", Token: "b"})
	o.end(wire.End{Session: "b"})
	o.open()
	got := drain(o)
	if len(got) != 1 || got[0].Type != wire.FrameRenewed || body[wire.Renewed](t, got[0]).Token != "new" {
		t.Fatalf("after a time without a stream: %v, want the last renewal of a alone", got)
	}
}

func TestOutboxForgetsAnswersOfAnOldStream(t *testing.T) {
	o := newOutbox()
	o.open()
	o.answer(1, wire.Answer{})
	o.shut()
	o.open()
	if got := drain(o); len(got) != 0 {
		t.Fatalf("an answer crossed over to another stream: %v", got)
	}
}

// TestOutboxIsBounded: a coordinator that offers and does not read gets no more answers than there is room for.
func TestOutboxIsBounded(t *testing.T) {
	o := newOutbox()
	o.open()
	routes := make([]netip.Prefix, 4096)
	for i := range routes {
		routes[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32)
	}
	big := wire.Answer{Gateway: &wire.Gateway{Name: "gw", Routes: routes}}
	size := len(frame(wire.FrameAnswer, 0, big).Body)
	for id := range uint64(2 * maxAnswers / size) {
		o.answer(id+1, big)
	}
	got := drain(o)
	if held := len(got) * size; held > maxAnswers || held < maxAnswers-size {
		t.Errorf("%d answers of %d bytes were kept", len(got), size)
	}
	o.answer(1, big)
	if len(drain(o)) != 1 {
		t.Error("there is no room again after all were written")
	}
	o.answer(1, big)
	o.shut()
	o.open()
	if o.waiting != 0 {
		t.Errorf("%d bytes wait in a new stream", o.waiting)
	}
}

// TestOutboxProperties: while a stream is up nothing is lost or doubled, and what is held stays bounded by its causes.
func TestOutboxProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := newOutbox()
		o.open()
		answers := map[uint64]bool{}
		ends := map[string]int{}
		latest := map[string]string{}
		id := uint64(0)
		check := func(f wire.Frame) {
			switch f.Type {
			case wire.FrameAnswer:
				if !answers[f.ID] {
					t.Fatalf("answer %d twice or never given", f.ID)
				}
				delete(answers, f.ID)
			case wire.FrameEnd:
				var e wire.End
				_ = json.Unmarshal(f.Body, &e)
				if ends[e.Session]--; ends[e.Session] < 0 {
					t.Fatalf("end of %s twice", e.Session)
				}
			case wire.FrameRenewed:
				var r wire.Renewed
				_ = json.Unmarshal(f.Body, &r)
				if latest[r.Session] != r.Token.Reveal() {
					t.Fatalf("renewal of %s is not the latest", r.Session)
				}
				delete(latest, r.Session)
			}
		}
		session := rapid.SampledFrom([]string{"a", "b", "c"})
		t.Repeat(map[string]func(*rapid.T){
			"answer": func(*rapid.T) { id++; answers[id] = true; o.answer(id, wire.Answer{}) },
			"end": func(t *rapid.T) {
				s := session.Draw(t, "session")
				ends[s]++
				delete(latest, s)
				o.end(wire.End{Session: s})
			},
			"renew": func(t *rapid.T) {
				s, token := session.Draw(t, "session"), rapid.StringMatching(`[a-z]{8}`).Draw(t, "token")
				latest[s] = token
				o.renew(wire.Renewed{Session: s, Token: wire.Secret(token)})
			},
			"take": func(*rapid.T) {
				if f, ok := o.take(); ok {
					check(f)
				}
			},
			"": func(t *rapid.T) {
				if len(o.renewed) > 3 || len(o.answers) != len(answers) {
					t.Fatalf("holds %d renewals, %d answers", len(o.renewed), len(o.answers))
				}
			},
		})
		for _, f := range drain(o) {
			check(f)
		}
		for s, n := range ends {
			if n != 0 {
				t.Fatalf("end of %s lost", s)
			}
		}
		if len(answers)+len(latest) != 0 {
			t.Fatalf("lost answers %v, renewals %v", answers, latest)
		}
	})
}

func TestOutboxFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutbox()
		o.flush(t.Context()) // no stream: nothing to wait for
		o.open()
		o.leave()
		flushed := make(chan struct{})
		go func() {
			defer close(flushed)
			o.flush(t.Context())
		}()
		f, err := o.next(t.Context())
		if err != nil || f.Type != wire.FrameLeaving {
			t.Fatalf("next: %v, %v", f, err)
		}
		synctest.Wait()
		select {
		case <-flushed:
			t.Fatal("flushed while the last frame is being written")
		default:
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, _ = o.next(ctx) }() // the writer comes back for more
		<-flushed
		cancel()
		synctest.Wait()

		o.leave()
		_, _ = o.next(t.Context())
		began := time.Now()
		brief, stop := context.WithTimeout(t.Context(), 2*time.Second)
		defer stop()
		o.flush(brief)
		if d := time.Since(began); d != 2*time.Second {
			t.Errorf("a stuck writer held flush for %v", d)
		}
		o.shut()
		o.flush(t.Context())
	})
}
