package agent

import (
	"fmt"
	"math"

	"os"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
)

// maxHistory bounds the events that status shows.
const maxHistory = 64

// marks are the moments of the first join; later ones change nothing.
type marks struct {
	mu      sync.Mutex
	started time.Time

	token, connect, join, path, handshake, usable, total time.Time
}

// set notes that the thing is there now, unless it was already.
func (m *marks) set(at *time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if at.IsZero() {
		*at = time.Now()
	}
}

func (m *marks) timings() Timings {
	m.mu.Lock()
	defer m.mu.Unlock()
	since := func(at time.Time) float64 {
		if at.IsZero() {
			return 0
		}
		return milliseconds(at.Sub(m.started))
	}
	return Timings{
		Token:     since(m.token),
		Connect:   since(m.connect),
		Join:      since(m.join),
		Path:      since(m.path),
		Handshake: since(m.handshake),
		Usable:    since(m.usable),
		Total:     since(m.total),
	}
}

// milliseconds rounds to a tenth.
func milliseconds(d time.Duration) float64 {
	return math.Round(float64(d)/float64(time.Millisecond)*10) / 10
}

// describe turns a path into what status and up show.
func describe(p tunnel.Path) control.Path {
	out := control.Path{Kind: string(p.Kind), Relay: p.Relay, Transport: string(p.Transport), RTT: milliseconds(p.RTT)}
	if p.Remote.IsValid() {
		out.Remote = p.Remote.String()
	}
	return out
}

// note changes the state and writes it into the history.
func (a *Agent) note(state control.State, what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state = state
	a.history = append(a.history, control.Event{At: time.Now(), What: what})
	if len(a.history) > maxHistory {
		a.history = a.history[len(a.history)-maxHistory:]
	}
}

// fail remembers what went wrong last.
func (a *Agent) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.problem = problem.From(err)
}

// recovered forgets it.
func (a *Agent) recovered() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.problem = nil
}

func (a *Agent) wasUp() bool {
	a.marks.mu.Lock()
	defer a.marks.mu.Unlock()
	return !a.marks.total.IsZero()
}

// Carried is how many bytes have gone through the tunnel.
func (a *Agent) Carried() uint64 {
	a.mu.Lock()
	t := a.tunnel
	a.mu.Unlock()
	if t == nil {
		return 0
	}
	return t.Carried()
}

// Status is the agent at this moment.
func (a *Agent) Status() control.Status {
	a.mu.Lock()
	s := a.session
	st := control.Status{
		State:   a.state,
		Mode:    string(a.opts.Mode),
		Since:   a.since,
		Rejoins: a.rejoins,
		History: append([]control.Event(nil), a.history...),
		Problem: a.problem,
		PID:     os.Getpid(),
	}
	if a.link != nil {
		st.Interface = a.link.Name()
	}
	if a.opts.Mode == ModeProxy && a.proxy != nil {
		st.Proxy = a.proxy.Addr().String()
	}
	a.mu.Unlock()
	if s != nil {
		s.describe(&st)
	}
	return st
}

// describe fills in what belongs to the session.
func (s *session) describe(st *control.Status) {
	gw, peer := s.at()
	st.Session, st.Network, st.Rules, st.Gateway = s.ID, s.Network, s.Rules, gw.Name
	s.mu.Lock()
	if w := s.companion.way; w != nil && w.up {
		st.Standby = w.gateway.Name
	}
	s.mu.Unlock()
	st.Addresses = texts(s.Addresses)
	a := s.agent
	a.routes.mu.Lock()
	st.LeftOut = texts(a.routes.left)
	for _, r := range a.routes.want[min(len(gw.Addresses), len(a.routes.want)):] {
		st.Routes = append(st.Routes, r.String())
	}
	a.routes.mu.Unlock()
	if n := gw.Names; n != nil {
		st.Names = append(st.Names, n.Exact...)
		for _, suffix := range n.Suffixes {
			st.Names = append(st.Names, "*."+suffix)
		}
	}
	expires, ends := s.keeper.times()
	st.Expires, st.Ends = &expires, &ends
	now := peer.Status()
	st.RxBytes, st.TxBytes = now.RxBytes, now.TxBytes
	if !now.Handshake.IsZero() {
		st.Handshake = &now.Handshake
	}
	if now.Path != (tunnel.Path{}) {
		path := describe(now.Path)
		path.Lost, path.Parities, path.Rebuilt = now.Lost, now.Parities, now.Rebuilt
		st.Path = &path
	}
	for _, c := range now.History {
		what := "no path: " + c.Why
		if c.Path != (tunnel.Path{}) {
			what = "path " + describe(c.Path).Words() + ": " + c.Why
		}
		st.History = append(st.History, control.Event{At: c.At, What: what})
	}
	sortEvents(st.History)
}

func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, 0, len(list))
	for _, v := range list {
		out = append(out, v.String())
	}
	return out
}

func sortEvents(events []control.Event) {
	slices.SortStableFunc(events, func(a, b control.Event) int { return a.At.Compare(b.At) })
}
