package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// Relay is a relay that sessions may use.
type Relay struct {
	Name string
	UDP  []netip.AddrPort // its addresses, at most one of each family; empty where it has no UDP
	URL  string           // where it takes WebSockets; "" where it does not
}

// Grant lets a peer's session use a relay, see [wire.RelayGrant].
type Grant struct {
	Relay   Relay
	Ticket  wire.Secret
	Expires time.Time
}

// RelayStatus is what is known of a relay at one moment.
type RelayStatus struct {
	Relay
	Reachable bool           // over UDP
	RTT       time.Duration  // over UDP; else how long opening a WebSocket took; 0 where neither has answered
	Mapped    netip.AddrPort // where the relay sees this tunnel's socket: a reflexive candidate; zero unless reachable
	Stream    bool           // a WebSocket is open
	Standing  bool           // and the relay lets it stay before there is a session
	Key       wire.Key       // the relay's, new at its every start; zero where it has not answered
	Err       error          // of the last try to open one
}

// RelayOptions say how a tunnel deals with relays.
type RelayOptions struct {
	// Dial opens a WebSocket to a relay's URL, by whatever proxy leads there, see [DialRelay]. nil means UDP only.
	Dial func(ctx context.Context, url string) (RelayStream, error)
	// Keep keeps every relay that [Tunnel.SetRelays] names ready for sessions that may come, and a WebSocket to it only
	// while its UDP port does not answer, with what [Tunnel.SetStanding] was given: the gateway. Without it, relays are asked once
	// and WebSockets dialled at once: the client.
	Keep bool
}

// RelayStream is a WebSocket to a relay; see [relay.Stream].
type RelayStream interface {
	Offer() relay.Offer
	Send(c relay.Channel, packets [][]byte) (taken int)
	Wait(c relay.Channel, limit time.Duration)
	SendSTUN(msg []byte) bool
	Receive() (msg []byte, err error)
	Close() error
}

// DialRelay gives a [RelayOptions.Dial] that does its requests with client, whose Timeout must be 0. header is added to them.
func DialRelay(client *http.Client, header http.Header) func(context.Context, string) (RelayStream, error) {
	return func(ctx context.Context, url string) (RelayStream, error) {
		s, err := relay.Dial(ctx, relay.DialOptions{URL: url, HTTP: client, Header: header})
		if err != nil {
			return nil, err
		}
		return s, nil
	}
}

// relays is what a tunnel has to do with relays. Peers may call it with their lock held; it never calls them with its own.
type relays struct {
	t     *Tunnel
	opts  RelayOptions
	ctx   context.Context // of dialling; ended by close
	end   context.CancelFunc
	tasks sync.WaitGroup // timers, dials, readers

	mu     sync.Mutex
	nodes  map[string]*node
	open   map[*stream]struct{} // those of nodes that others have taken the place of included
	asks   map[nat.TxID]*node
	binds  map[nat.TxID]*leg
	early  time.Time                // until when WebSockets are dialled before they are needed
	waits  map[string][]chan<- bool // who waits for a relay to answer
	stands stands
	timer  *time.Timer
	closed bool
}

func newRelays(t *Tunnel, opts RelayOptions) *relays {
	r := &relays{
		t: t, opts: opts,
		nodes: map[string]*node{}, open: map[*stream]struct{}{}, asks: map[nat.TxID]*node{}, binds: map[nat.TxID]*leg{}, waits: map[string][]chan<- bool{},
	}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// SetRelays says which relays are kept ready, in the order of preference. Each is asked at once, over all its addresses, and
// without [RelayOptions.Keep] WebSockets to the first of them are dialled as well.
func (t *Tunnel) SetRelays(list []Relay) {
	r := t.relays
	r.act(func(now time.Time) {
		for _, n := range r.nodes {
			n.kept = false
		}
		for i, one := range list[:min(len(list), wire.MaxRelays)] {
			n := r.node(one)
			n.kept, n.turn = true, i
			if n.state != udpUp {
				n.ask(now)
			}
			n.rearm(now, r.opts.Keep)
		}
		r.early = now.Add(earlyFor)
		r.forget()
	})
}

// Relay waits until a relay that [Tunnel.SetRelays] has named answers over UDP, and gives its state. The error says why it waits no
// longer; the state is given then as well.
func (t *Tunnel) Relay(ctx context.Context, name string) (RelayStatus, error) {
	r := t.relays
	up := make(chan bool, 1)
	known := false
	r.act(func(time.Time) {
		n := r.nodes[name]
		if known = n != nil; known && n.state != udpUp {
			r.waits[name] = append(r.waits[name], up)
		} else {
			up <- known
		}
	})
	var err error
	select {
	case ok := <-up:
		if !ok {
			err = fmt.Errorf("ask relay %q: %w", name, errNoRelay)
		}
	case <-ctx.Done():
		err = fmt.Errorf("ask relay %q: %w", name, context.Cause(ctx))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waits[name] = slices.DeleteFunc(r.waits[name], func(c chan<- bool) bool { return c == up })
	if n := r.nodes[name]; n != nil {
		return n.status(), err
	}
	return RelayStatus{}, err
}

var errNoRelay = errors.New("no such relay is kept, or it does not answer")

// Relays gives the state of the relays that are known, the nearest first: those that answer over UDP, then those with a WebSocket,
// then the rest in the order of [Tunnel.SetRelays].
func (t *Tunnel) Relays() []RelayStatus {
	r := t.relays
	r.mu.Lock()
	nodes := make([]*node, 0, len(r.nodes))
	for _, n := range r.nodes {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *node) int { return cmp.Or(cmp.Compare(a.turn, b.turn), cmp.Compare(a.Name, b.Name)) })
	list := make([]RelayStatus, len(nodes))
	for i, n := range nodes {
		list[i] = n.status()
	}
	r.mu.Unlock()
	slices.SortStableFunc(list, func(a, b RelayStatus) int {
		class := func(s RelayStatus) int {
			switch {
			case s.Reachable:
				return 0
			case s.Stream:
				return 1
			}
			return 2
		}
		return cmp.Or(cmp.Compare(class(a), class(b)), cmp.Compare(a.RTT, b.RTT))
	})
	return list
}

// node gives the node of a relay, a new one where its name or anything else of it is new. Legs on one that has changed stay there
// until they end. mu is held.
func (r *relays) node(one Relay) *node {
	n := r.nodes[one.Name]
	if n != nil && n.URL == one.URL && slices.Equal(n.UDP, one.UDP) {
		return n
	}
	n = newNode(one)
	r.nodes[one.Name] = n
	return n
}

// forget drops relays that nobody uses. mu is held.
func (r *relays) forget() {
	for name, n := range r.nodes {
		if !n.kept && len(n.legs) == 0 && n.stream == nil && !n.dialing {
			delete(r.nodes, name)
		}
	}
}

// act is how anything happens to relays: do changes them, then what has become due is sent, outside the lock, and the timer is
// set for what comes next.
func (r *relays) act(do func(now time.Time)) {
	now := time.Now()
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	do(now)
	var down []*node
	questions := r.questions(now, &down)
	r.stands.expire(now)
	idle := r.streams(now)
	r.rearm(now)
	r.mu.Unlock()
	for _, q := range questions {
		_ = r.t.bind.sendTo(q.pkt, q.to) // a relay that cannot be reached does not answer
	}
	for _, s := range idle {
		s.close() // its reader does the rest
	}
	for _, n := range down {
		r.t.log.Info("a relay does not answer over udp", "relay", n.Name)
		r.stir(n)
	}
}

// questions encodes what is due to be asked, and tells which relays are down from now on. mu is held.
func (r *relays) questions(now time.Time, down *[]*node) []outgoing {
	var out []outgoing
	for _, n := range r.nodes {
		to, changed := n.due(now, r.opts.Keep)
		if changed {
			*down = append(*down, n)
			r.answers(n, false)
		}
		for _, addr := range to {
			id := randomID()
			for _, old := range n.booked(addr, id, now) {
				delete(r.asks, old)
			}
			r.asks[id] = n
			out = append(out, outgoing{relay.WantRequest(id), &route{spot: spot{remote: addr}}})
		}
	}
	return out
}

// answers tells whoever waits for a relay whether it answers. mu is held.
func (r *relays) answers(n *node, up bool) {
	if n.stream != nil || r.opts.Dial == nil || n.URL == "" || up {
		for _, c := range r.waits[n.Name] {
			c <- up
		}
		delete(r.waits, n.Name)
	}
}

// rearm sets the timer. mu is held.
func (r *relays) rearm(now time.Time) {
	var wake time.Time
	wake = sooner(wake, r.stands.until)
	for _, n := range r.nodes {
		wake = sooner(sooner(wake, n.next), n.redial)
		if n.stream != nil && !n.needed.IsZero() {
			wake = sooner(wake, n.needed.Add(unusedFor))
		}
	}
	r.disarm()
	if wake.IsZero() {
		return
	}
	r.tasks.Add(1)
	r.timer = time.AfterFunc(wake.Sub(now), func() {
		defer r.tasks.Done()
		r.act(func(time.Time) {})
	})
}

func (r *relays) disarm() {
	if r.timer != nil && r.timer.Stop() {
		r.tasks.Done()
	}
	r.timer = nil
}

// take handles a STUN message if it is a relay's answer.
func (r *relays) take(pkt []byte, from netip.AddrPort) bool {
	if id, code, ok := relay.ParseStandAnswer(pkt); ok {
		r.stood(pkt, id, code)
		return true
	}
	if a, ok := relay.ParseAnswer(pkt); ok {
		r.bound(pkt, a)
		return true
	}
	id, mapped, ok := nat.PeekResponse(pkt)
	if !ok {
		return false
	}
	r.mu.Lock()
	n := r.asks[id]
	r.mu.Unlock()
	if n == nil {
		return false
	}
	offer, ok := relay.ParseOffer(pkt)
	if !ok {
		return true // a STUN server that is no relay
	}
	var what news
	r.act(func(now time.Time) {
		if what, ok = n.answered(from, id, unmap(mapped), offer, now); !ok {
			return
		}
		for old, of := range r.asks {
			if of == n {
				delete(r.asks, old)
			}
		}
		n.rearm(now, r.opts.Keep)
		if jitter := n.next.Sub(now) / 10; jitter > 0 {
			n.next = n.next.Add(-time.Duration(rand.Int64N(int64(jitter)))) // many gateways do not ask at once
		}
		r.answers(n, true)
	})
	if what.first || what.rebind {
		r.stir(n)
	}
	return true
}

// bound hands the answer to a BIND to its leg.
func (r *relays) bound(pkt []byte, a relay.Answer) {
	r.mu.Lock()
	l := r.binds[a.ID]
	r.mu.Unlock()
	if l != nil {
		l.peer.act(func(now time.Time) { l.answered(pkt, a, now) })
	}
}

// Pace at which the legs of a relay bind anew: a relay verifies a signature for each.
const (
	stirBatch = 20
	stirPause = 10 * time.Millisecond
)

// stir has every leg of a relay look again, those first whose traffic flows through it.
func (r *relays) stir(n *node) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	legs := make([]*leg, 0, len(n.legs))
	for l := range n.legs {
		legs = append(legs, l)
	}
	r.tasks.Add(1)
	r.mu.Unlock()
	slices.SortFunc(legs, func(a, b *leg) int { return -cmp.Compare(a.carries.Load(), b.carries.Load()) })
	look := func() {
		defer r.tasks.Done()
		for i, l := range legs {
			if i%stirBatch == stirBatch-1 && !r.pause(stirPause) {
				return
			}
			l.peer.act(func(time.Time) {})
		}
	}
	if len(legs) < stirBatch {
		look()
		return
	}
	go look()
}

// pause waits; false where the tunnel is being closed.
func (r *relays) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.ctx.Done():
		return false
	}
}

// refresh asks every relay at once: the local network may have changed.
func (r *relays) refresh() {
	r.act(func(now time.Time) {
		for _, n := range r.nodes {
			if n.kept || len(n.legs) > 0 {
				n.ask(now)
				n.unsure = true
			}
			n.redial, n.failed = time.Time{}, 0
		}
	})
}

// close ends everything and waits. No peer may be left.
func (r *relays) close() {
	r.mu.Lock()
	r.closed = true
	r.disarm()
	r.end()
	open := slices.Collect(maps.Keys(r.open))
	r.mu.Unlock()
	for _, s := range open {
		s.close()
	}
	r.tasks.Wait()
}
