package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/internal/problem"
)

func TestMain(m *testing.M) {
	if dir := childDir(); dir != "" {
		crashChild(dir)
	}
	goleak.VerifyTestMain(m)
}

var testKey = ed25519.NewKeyFromSeed([]byte("0123456789abcdef0123456789abcdef"))

// open makes a log that ends with the test.
func open(t testing.TB, store Store, edit ...func(*Options)) *Log {
	t.Helper()
	o := Options{Store: store, Key: testKey, Node: "n1"}
	for _, f := range edit {
		f(&o)
	}
	l, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, l) })
	return l
}

func shut(t testing.TB, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
}

// joined is some record.
func joined(n int) Record {
	r := Record{Event: Join, Session: &Session{UID: fmt.Sprint("s", n)}, Unmapped: Unmapped{Network: "corp", Job: &Job{Repository: "acme/shop", RunID: fmt.Sprint(1000 + n)}}}
	r.Allowed([]string{"deploy"})
	return r
}

func record(t testing.TB, l *Log, from, to int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := l.Record(t.Context(), joined(n)); err != nil {
			t.Fatal(err)
		}
	}
}

// sound verifies what a store holds and gives the report.
func sound(t testing.TB, store Store) Report {
	t.Helper()
	rep := verified(t, store)
	if !rep.OK() {
		t.Fatalf("findings: %+v", rep.Findings)
	}
	return rep
}

func verified(t testing.TB, store Store) Report {
	t.Helper()
	r := Reader{Store: store, Keys: []ed25519.PublicKey{testKey.Public().(ed25519.PublicKey)}}
	rep, err := r.Verify(t.Context(), Anchor{})
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestOptionsNeedTheirParts(t *testing.T) {
	for _, o := range []Options{{}, {Store: audittest.New()}, {Key: testKey}} {
		if _, err := Open(t.Context(), o); err == nil {
			t.Errorf("%+v was opened", o)
		}
	}
}

func TestRecordsMakeAChain(t *testing.T) {
	store := audittest.New()
	l := open(t, store)
	record(t, l, 0, 5)
	if rep := sound(t, store); rep.Records != 5 || rep.First != 1 || rep.Last != 5 {
		t.Errorf("report %+v", rep)
	}
	text := bytes.SplitN(store.Messages()[0].Data, []byte{'\n'}, 2)[0]
	var got struct {
		Prev     string
		Class    int `json:"class_uid"`
		Type     int `json:"type_uid"`
		Status   int `json:"status_id"`
		Metadata struct {
			Version  string
			Event    string `json:"event_code"`
			Sequence int
		}
		Authorizations []Authorization
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got.Class != 4014 || got.Type != 401401 || got.Status != 1 || got.Metadata.Event != "session.join" || got.Metadata.Sequence != 1 ||
		got.Authorizations[0] != (Authorization{"allowed", Named{"deploy"}}) {
		t.Errorf("%s", text)
	}
}

// TestNothingIsAnsweredBeforeItIsStored: Record returns after the store has the record, never before.
func TestNothingIsAnsweredBeforeItIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		var stored atomic.Bool
		store.Before = func([]byte) (bool, error) {
			time.Sleep(time.Second)
			stored.Store(true)
			return false, nil
		}
		l := open(t, store)
		if err := l.Record(t.Context(), joined(1)); err != nil || !stored.Load() {
			t.Errorf("answered: %v, stored: %v", err, stored.Load())
		}
		shut(t, l)
	})
}

// TestGroupCommit: what comes in while a block is being stored makes up the next one.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		store.Before = func([]byte) (bool, error) {
			time.Sleep(10 * time.Millisecond)
			return false, nil
		}
		l := open(t, store)
		var wg sync.WaitGroup
		began := time.Now()
		for n := range 1000 {
			wg.Go(func() {
				if err := l.Record(t.Context(), joined(n)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 40*time.Millisecond {
			t.Errorf("1000 records took %s at 10 ms a block", took)
		}
		shut(t, l)
		if rep := sound(t, store); rep.Records != 1000 || rep.Seals > 4 {
			t.Errorf("%d records in %d blocks", rep.Records, rep.Seals)
		}
	})
}

// TestAStoreThatIsAway: whoever waits is told that it is, what nobody waits for is stored once it is back, and what finds no room
// is counted in the log itself.
func TestAStoreThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		l := open(t, store, func(o *Options) { o.Queue = 4 })
		store.SetAway(true)
		began := time.Now()
		err := l.Record(t.Context(), joined(1))
		if problem.CodeOf(err) != problem.Unreachable || time.Since(began) != 5*time.Second {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		for n := range 10 {
			l.Note(joined(n))
			synctest.Wait()
		}
		store.SetAway(false)
		record(t, l, 100, 101)
		shut(t, l)
		sound(t, store)
		all := texts(store)
		if n := strings.Count(all, `"event_code":"audit.lost"`); n != 1 || !strings.Contains(all, `"count":6`) {
			t.Errorf("the lost records are not spoken of: %s", all)
		}
	})
}

func texts(store *audittest.Store) string {
	var b strings.Builder
	for _, m := range store.Messages() {
		b.Write(m.Data)
	}
	return b.String()
}

// TestLostAcknowledgements: a record whose block was stored but whose acknowledgement was lost stands in the log once.
func TestLostAcknowledgements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		tries := 0
		store.Before = func([]byte) (bool, error) {
			if tries++; tries%3 != 0 {
				return tries%3 == 1, errors.New("no answer")
			}
			return false, nil
		}
		l := open(t, store)
		record(t, l, 0, 20)
		shut(t, l)
		if rep := sound(t, store); rep.Records != 20 {
			t.Errorf("%d records", rep.Records)
		}
	})
}

// TestLateBlocks: an append that timed out may yet be stored; the same place never gets two different blocks of ours.
func TestLateBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		var late [][]byte
		failing := true
		store.Before = func(data []byte) (bool, error) {
			if failing {
				late = append(late, bytes.Clone(data))
				if len(late) == 3 {
					failing = false
				}
				return false, context.DeadlineExceeded
			}
			return false, nil
		}
		l := open(t, store)
		record(t, l, 0, 1)
		for _, b := range late[1:] {
			if !bytes.Equal(b, late[0]) {
				t.Error("a block that may yet be stored was made anew")
			}
		}
		shut(t, l)
		sound(t, store)
	})
}

// rivals has so many nodes write to one store, each for four callers with so many records, and wants all of them there.
func rivals(t *testing.T, store Store, nodes, each int) {
	t.Helper()
	var wg sync.WaitGroup
	for node := range nodes {
		l := open(t, store, func(o *Options) { o.Node, o.Rivals = fmt.Sprint("n", node), true })
		for w := range 4 {
			wg.Go(func() {
				for n := range each {
					if err := l.Record(t.Context(), joined(node*1000+w*100+n)); err != nil {
						t.Errorf("record %d of caller %d of node %d: %v", n, w, node, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	if rep := sound(t, store); rep.Records != uint64(nodes*4*each) {
		t.Errorf("%d records", rep.Records)
	}
}

// TestNodesShareAChain: several writers at once, each with its records in order, none lost, none twice.
func TestNodesShareAChain(t *testing.T) {
	store := audittest.New()
	rivals(t, store, 3, 50)
	all := texts(store)
	for node := range 3 {
		for w := range 4 {
			for n := range 50 {
				if c := strings.Count(all, fmt.Sprintf(`"uid":"s%d"`, node*1000+w*100+n)); c != 1 {
					t.Fatalf("record %d/%d/%d is there %d times", node, w, n, c)
				}
			}
		}
	}
}

func TestRestartGoesOn(t *testing.T) {
	store := audittest.New()
	for i := range 3 {
		l := open(t, store)
		record(t, l, i*10, i*10+10)
		shut(t, l)
	}
	if rep := sound(t, store); rep.Records != 30 || rep.Last != 30 {
		t.Errorf("%+v", rep)
	}
}

// TestForeignMessages: what somebody else puts into the stream is passed over, said so in a record, and stays a finding.
func TestForeignMessages(t *testing.T) {
	for name, running := range map[string]bool{"while running": true, "before the start": false} {
		t.Run(name, func(t *testing.T) {
			store := audittest.New()
			l := open(t, store)
			record(t, l, 0, 3)
			if !running {
				shut(t, l)
			}
			if _, err := store.Append(t.Context(), []byte("hello\n"), uint64(len(store.Messages()))); err != nil {
				t.Fatal(err)
			}
			if !running {
				l = open(t, store)
			}
			record(t, l, 3, 4)
			record(t, l, 4, 5) // behind the note on it
			shut(t, l)
			rep := verified(t, store)
			if rep.OK() || rep.Records != 6 {
				t.Errorf("%+v", rep)
			}
			if !strings.Contains(texts(store), `"event_code":"audit.broken"`) {
				t.Error("no record speaks of it")
			}
		})
	}
}

// TestLostTail: a store that forgets what it acknowledged is found out by the mark, at the next start and by verify.
func TestLostTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		l := open(t, store)
		record(t, l, 0, 10)
		shut(t, l)
		count := len(store.Messages())
		store.Tamper(func(list []message) []message { return list[:count-2] })
		if rep := verified(t, store); rep.OK() {
			t.Error("verify does not see that the end is gone")
		}
		l = open(t, store)
		record(t, l, 10, 11)
		shut(t, l)
		rep := verified(t, store)
		if rep.OK() || !strings.Contains(rep.Findings[0].What, "records 9 to 10 are missing") || rep.Last != 12 {
			t.Errorf("%+v", rep)
		}
	})
}

// TestEmptiedByAge: a log that retention has emptied goes on with its numbers.
func TestEmptiedByAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		l := open(t, store)
		record(t, l, 0, 3)
		shut(t, l)
		store.Drop(len(store.Messages()))
		store.SetLimits(time.Hour, 1<<30)
		sound(t, store)
		l = open(t, store)
		record(t, l, 3, 4)
		time.Sleep(time.Hour)
		if rep := sound(t, store); rep.First != 4 || rep.Records != 1 {
			t.Errorf("%+v", rep)
		}
		shut(t, l)
	})
}

func TestRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		store.SetLimits(time.Hour, 1<<30)
		l := open(t, store)
		record(t, l, 0, 3)
		time.Sleep(time.Hour)
		record(t, l, 3, 6)
		store.Drop(3)
		if rep := verified(t, store); rep.OK() {
			t.Error("a beginning that is gone for no reason is not found")
		}
		time.Sleep(59 * time.Minute)
		if rep := sound(t, store); rep.First != 4 || rep.Records != 3 {
			t.Errorf("%+v", rep)
		}
		shut(t, l)
	})
}

// TestCopy: what is stored goes to the copy as well, seals left out; a reader that stalls holds nothing up.
func TestCopy(t *testing.T) {
	store := audittest.New()
	var b bytes.Buffer
	l := open(t, store, func(o *Options) { o.Copy = &b })
	record(t, l, 0, 3)
	shut(t, l)
	if lines := strings.Split(strings.TrimSpace(b.String()), "\n"); len(lines) != 3 || strings.Contains(b.String(), "seal") {
		t.Errorf("%q", lines)
	}

	synctest.Test(t, func(t *testing.T) {
		stuck := stalled{make(chan struct{})}
		l := open(t, audittest.New(), func(o *Options) { o.Copy = stuck })
		record(t, l, 0, copyQueue+10)
		shut(t, l)
		close(stuck.until)
		synctest.Wait()
	})
}

type stalled struct{ until chan struct{} }

func (s stalled) Write(p []byte) (int, error) {
	<-s.until
	return len(p), nil
}

func TestTally(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		l := open(t, store)
		for range 1000 {
			l.Refused(problem.New(problem.TokenInvalid, "m", "n"), addr("192.0.2.1"))
		}
		l.Refused(problem.New(problem.TokenInvalid, "m", "n"), addr("192.0.2.2"))
		l.Refused(problem.New(problem.TokenExpired, "m", "n"), addr("192.0.2.2"))
		time.Sleep(tallyEvery + time.Second)
		if all := texts(store); !strings.Contains(all, `[{"code":"token-expired","from":"192.0.2.2","count":1},{"code":"token-invalid","from":"192.0.2.1","count":1001}]`) ||
			!strings.Contains(all, `"count":1002`) {
			t.Errorf("%s", all)
		}
		time.Sleep(time.Hour)
		if len(store.Messages()) != 1 {
			t.Error("nothing was refused, and it is said")
		}
		for i := range 100_000 {
			l.Refused(problem.New(problem.TokenInvalid, "m", "n"), addr(fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)))
		}
		if n := len(l.tally.counts[problem.TokenInvalid].source); n > tallySources {
			t.Errorf("%d addresses are remembered", n)
		}
		shut(t, l)
	})
}

func TestClosedLog(t *testing.T) {
	l := open(t, audittest.New())
	shut(t, l)
	if err := l.Record(t.Context(), joined(1)); problem.CodeOf(err) != problem.Unreachable {
		t.Errorf("recorded: %v", err)
	}
	l.Note(joined(1))
}

// TestAbandoned: a store that stays away does not keep a coordinator from ending, and what is lost is said.
func TestAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		l, err := Open(t.Context(), Options{Store: store, Key: testKey})
		if err != nil {
			t.Fatal(err)
		}
		store.SetAway(true)
		for n := range 5 {
			l.Note(joined(n))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.Close(ctx); err == nil {
			t.Error("closed as if nothing were lost")
		}
	})
}

func TestTooLarge(t *testing.T) {
	l := open(t, audittest.New())
	r := joined(1)
	r.Message = strings.Repeat("x", MaxLine)
	if err := l.Record(t.Context(), r); err == nil {
		t.Error("stored")
	}
	if err := l.Record(t.Context(), Record{Event: "unheard.of"}); err == nil {
		t.Error("stored")
	}
}
