//go:build linux

package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// path is the way that packets take, as `culvert status --json` shows it.
type path struct {
	Kind      wire.CandidateKind `json:"kind"`
	Transport string             `json:"transport"`
	Relay     string             `json:"relay"`
}

func (p path) direct() bool { return p.Kind != "" && p.Kind != wire.Relayed }

// String names the way in a word, as the tables of the documentation do.
func (p path) String() string {
	switch {
	case p.direct():
		return "direct"
	case p.Kind == wire.Relayed && p.Transport == "websocket":
		return "websocket"
	case p.Kind == wire.Relayed:
		return "relay"
	}
	return "none"
}

// currentPath asks a job for its path; the zero path is none.
func currentPath(t testing.TB, job *stage.Job) path {
	t.Helper()
	var status struct {
		Path path `json:"path"`
	}
	decode(t, culvert(t, job, 0, "status", "--json").Stdout, &status)
	return status.Path
}

// waitPath waits until a job's path is as wanted and gives how long that took.
func waitPath(t testing.TB, job *stage.Job, within time.Duration, want func(path) bool) (path, time.Duration) {
	t.Helper()
	began := time.Now()
	for {
		p := currentPath(t, job)
		took := time.Since(began)
		if want(p) || took > within {
			return p, took
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// stream is a TCP connection through the tunnel that carries a steady rate towards the runner, and counts what arrives.
type stream struct {
	began time.Time
	done  sync.WaitGroup
	stop  func()

	mu  sync.Mutex
	got []int // bytes in each tenth of a second since began
	err error // why it ended
}

const (
	tick       = 100 * time.Millisecond
	streamRate = 8_000_000 / 8 // bytes a second
)

// startStream has the private service send, and the runner receive.
func startStream(t testing.TB, s *stage.Stage) *stream {
	t.Helper()
	l, err := s.Private.Listen(netip.AddrPortFrom(s.Private.Addr(), portStream).String())
	must(t, err)
	st := &stream{began: time.Now()}
	st.done.Go(func() { pour(l) })
	conn, err := s.Runner.Dial(timeout(t, 20*time.Second), "tcp", l.Addr().String())
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	st.done.Go(func() { st.count(conn) })
	var once sync.Once
	st.stop = func() {
		once.Do(func() {
			st.note(0)
			conn.Close()
			l.Close()
			st.done.Wait()
		})
	}
	t.Cleanup(st.stop)
	return st
}

// portStream is where the private service pours, see startStream.
const portStream = 5202

// pour sends at streamRate to the one who connects, until the connection or the listener is closed.
func pour(l net.Listener) {
	conn, err := l.Accept()
	if err != nil {
		return
	}
	defer conn.Close()
	chunk := make([]byte, streamRate/100)
	for next := time.Now(); ; next = next.Add(10 * time.Millisecond) {
		time.Sleep(time.Until(next))
		if _, err := conn.Write(chunk); err != nil {
			return
		}
	}
}

func (s *stream) count(conn net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buf)
		s.note(n)
		if err != nil {
			s.mu.Lock()
			s.err = err
			s.mu.Unlock()
			return
		}
	}
}

// note books bytes that have arrived.
func (s *stream) note(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := int(time.Since(s.began) / tick)
	for len(s.got) <= at {
		s.got = append(s.got, 0)
	}
	s.got[at] += n
}

// alive wants the connection to be open.
func (s *stream) alive(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		t.Fatalf("the stream ended after %v: %v", time.Since(s.began).Round(tick), s.err)
	}
}

// slow gives the spans in which less than 1 Mbit/s arrived in the second that follows, and none of it lies within a span that
// is allowed.
func (s *stream) slow(allowed []span) []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	const perSecond = int(time.Second / tick)
	var bad []time.Duration
	for i := 0; i+perSecond < len(s.got); i++ {
		at := span{time.Duration(i) * tick, time.Duration(i+perSecond) * tick}
		sum := 0
		for _, n := range s.got[i : i+perSecond] {
			sum += n
		}
		if sum < 1_000_000/8 && !slices.ContainsFunc(allowed, at.overlaps) {
			bad = append(bad, at.from)
		}
	}
	return bad
}

// span is a time since a stream began.
type span struct{ from, to time.Duration }

func (s span) overlaps(o span) bool { return s.from < o.to && o.from < s.to }

// grantStream grants the port of startStream besides the usual ones.
func grantStream(s *stage.Stage) string {
	return strings.TrimSuffix(strings.TrimSpace(s.DefaultRules()), "]") + fmt.Sprintf(", \"tcp %s:%d\"]\n", s.Private.Addr(), portStream)
}

func (s span) String() string { return fmt.Sprintf("%v to %v", s.from, s.to) }

// within is how soon traffic flows again after its path was cut.
const within = 3 * time.Second

// One connection lives through relay, direct, relay and direct again, each change within three seconds, and never slows down
// beside that.
func TestConnectionSurvivesItsPaths(t *testing.T) {
	// A machine that is busy with something else for a while is not what this measures: the times may be missed twice.
	const tries = 3
	for try := 1; ; try++ {
		var complaints []string
		t.Run(fmt.Sprintf("try-%d", try), func(t *testing.T) { complaints = surviveOnce(t) })
		if len(complaints) == 0 {
			return
		}
		if t.Logf("try %d: %s", try, strings.Join(complaints, "; ")); try == tries {
			t.Fatalf("too slow in each of %d tries", tries)
		}
	}
}

// surviveOnce says what was too slow. What must never happen fails the test.
func surviveOnce(t *testing.T) (complaints []string) {
	w := newWalk(t, stage.Options{Rules: grantStream})
	stream := startStream(t, w.stage)
	w.began = stream.began
	for step := range walkSteps {
		time.Sleep(2 * time.Second) // a second and more of steady traffic on each path
		if took := w.change(t, step); took > within {
			complaints = append(complaints, fmt.Sprintf("%s only after %v", walkSteps[step], took))
		}
		stream.alive(t)
	}
	time.Sleep(2 * time.Second)
	stream.alive(t)
	stream.stop()
	if slow := stream.slow(w.allowed); len(slow) > 0 {
		complaints = append(complaints, fmt.Sprintf("less than 1 Mbit/s in the seconds from %v, beside %v", slow, w.allowed))
	}
	culvert(t, w.job, 0, "down")
	return complaints
}

// walk is a session that is led from the relay, on which it starts, over one path after the other.
type walk struct {
	stage   *stage.Stage
	job     *stage.Job
	began   time.Time // of the traffic that is watched
	allowed []span    // in which it may be slow
}

// walkSteps are the paths that follow.
var walkSteps = []string{"direct", "relay", "direct"}

// newWalk gives a session that is relayed because the direct way is blocked.
func newWalk(t testing.TB, opts stage.Options) *walk {
	t.Helper()
	s := setup(t, opts)
	must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	if p := currentPath(t, job); p.String() != "relay" {
		t.Fatalf("without a direct way the path is %v", p)
	}
	return &walk{stage: s, job: job, allowed: []span{{0, time.Second}}}
}

// change blocks the direct way or opens it, and gives how long it took until the path was the next one.
func (w *walk) change(t testing.TB, step int) time.Duration {
	t.Helper()
	set := w.stage.Net.Unblock
	if walkSteps[step] == "relay" {
		set = w.stage.Net.Block
	}
	from := time.Since(w.began)
	w.allowed = append(w.allowed, span{from, from + within})
	must(t, set(w.stage.Runner.Public(), w.stage.GatewayBox.Public()))
	p, took := waitPath(t, w.job, time.Minute, func(p path) bool { return p.String() == walkSteps[step] })
	if p.String() != walkSteps[step] {
		t.Fatalf("the path is %v a minute later, want %s", p, walkSteps[step])
	}
	t.Logf("%s after %v", walkSteps[step], took.Round(10*time.Millisecond))
	return took
}
