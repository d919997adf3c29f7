package tunnel

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

const (
	// insideLimit is how many packets of all peers may be inside the device on their way to the TUN, 64 KiB of memory each. It has to
	// keep every core busy with batches.
	insideLimit = 512
	// insideLeast is how many of these one peer may have at least: two batches.
	insideLeast = 88
	// turnTotal bounds the bytes that wait for the device: each peer may have half of what is left of it, and turnLeast in any case.
	turnTotal = 64 << 20
	turnLeast = 64 << 10
	// turnQuantum is how many bytes of a peer the device gets in its turn, more than a batch; packetCost is added to a packet's length there, for what each
	// costs whatever its length.
	turnQuantum = 128 << 10
	packetCost  = 256
	// insideLost is the share of a peer whose packets do not come out: whoever sends what cannot be decrypted holds up nobody else.
	insideLost = 4
	// insideStall is after how long packets that did not come out at the TUN are written off: the device drops without a word what it
	// cannot decrypt.
	insideStall = 100 * time.Millisecond
	// turnWait is how long the socket is left alone at most while the device has no room.
	turnWait = time.Millisecond
	// grantMost is for how many packets one look at the sums is enough.
	grantMost = 48
	// takeMost is how many the device gets from the queues at a time: enough that segments are merged well, and not all on one core.
	takeMost = 96

	chunkSize = 16 << 10
)

// turns share between peers what the device can take. As long as it keeps up, packets go to it as they come. When it does not, each peer's
// packets wait in a queue of its own, and the queues are served in turns by bytes (deficit round robin). Meanwhile the socket is read on, so
// that the kernel drops nothing: what is too much is dropped from the queue of who sends too much.
//
// The goroutine that reads from the socket puts in and takes out; the peers' goroutines in the device say what has come out at the TUN, see
// [flight].
type turns struct {
	owner func(netip.Addr) *Peer // of an address inside the tunnel; nil for nobody

	mu         sync.Mutex
	inside     int // packets in the device
	bytes      int // that wait
	head, tail *turn
	flying     map[*turn]struct{} // those with packets in the device
	looked     time.Time          // when those were last written off of which nothing came out
	busy       int                // peers with packets here or in the device
	room       chan struct{}      // one token: the device may have room
	keys       [takeMost]uint64   // take's

	crowded atomic.Bool // something waits
	dropped atomic.Uint64
}

// turn is one peer's part in turns, guarded by turns.mu.
type turn struct {
	peer    *Peer
	chunks  []*chunk
	bytes   int     // in chunks
	inside  int     // packets in the device …
	flight  *flight // … which are these; nil where there are none
	moved   time.Time
	deficit int
	next    *turn
	queued  bool
	lost    bool // what was in the device has been written off, and nothing has come out since
	gone    bool
}

// chunk holds packets, each behind its length in two bytes.
type chunk struct {
	from, to int
	data     [chunkSize]byte
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

func newTurns(owner func(netip.Addr) *Peer) *turns {
	return &turns{owner: owner, flying: map[*turn]struct{}{}, room: make(chan struct{}, 1)}
}

func (t *turn) isBusy() bool { return t.inside > 0 || t.bytes > 0 }

// note keeps count of busy peers.
func (ts *turns) note(t *turn, was bool) {
	switch is := t.isBusy(); {
	case is && !was:
		ts.busy++
	case was && !is:
		ts.busy--
	}
}

// share is how many packets a peer may have in the device. mu is held.
func (ts *turns) share(t *turn) int {
	if t.lost {
		return insideLost
	}
	return max(insideLeast, insideLimit/max(1, ts.busy))
}

// grant tells how many packets of a peer may go to the device past the queues.
func (ts *turns) grant(p *Peer) int {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if ts.head != nil || p.turn.bytes > 0 || ts.inside >= insideLimit {
		return 0
	}
	return max(0, min(grantMost, ts.share(&p.turn)-p.turn.inside))
}

// entered counts packets that have gone to the device, by their keys.
func (ts *turns) entered(p *Peer, keys ...uint64) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.enter(&p.turn, keys, time.Now())
}

func (ts *turns) enter(t *turn, keys []uint64, now time.Time) {
	if t.gone || len(keys) == 0 {
		return
	}
	was := t.isBusy()
	if t.inside == 0 {
		t.moved, t.flight = now, flights.Get().(*flight)
		ts.flying[t] = struct{}{}
	}
	for _, key := range keys {
		ts.now(t, t.flight.push(key))
	}
	ts.note(t, was)
}

// now sets how many packets of a peer are in the device.
func (ts *turns) now(t *turn, n int) {
	ts.inside += n - t.inside
	if t.inside = n; n > 0 {
		return
	}
	if delete(ts.flying, t); t.flight != nil {
		t.flight.clear()
		flights.Put(t.flight)
		t.flight = nil
	}
}

// left is told of packets that have come out of the device, all of one peer, which has the address from; the last one has this key.
func (ts *turns) left(from netip.Addr, key uint64) {
	p := ts.owner(from)
	if p == nil {
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := &p.turn
	was := t.isBusy()
	if t.inside > 0 {
		ts.now(t, t.flight.pop(key))
	}
	t.moved, t.lost = time.Now(), false
	ts.note(t, was)
	ts.enqueue(t)
	if ts.head != nil {
		signal(ts.room)
	}
}

// source is where an IP packet says that it comes from.
func source(packet []byte) netip.Addr {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(packet[12:16]))
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[8:24]))
	}
	return netip.Addr{}
}

// put has a packet wait, or drops it where its peer has enough that waits.
func (ts *turns) put(p *Peer, packet []byte) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t, size := &p.turn, len(packet)
	if t.gone || t.bytes+size > max(turnLeast, (turnTotal-ts.bytes)/2) || size+2 > chunkSize {
		ts.dropped.Add(1)
		return
	}
	was := t.isBusy()
	t.push(packet)
	ts.bytes += size
	ts.note(t, was)
	ts.enqueue(t)
	ts.crowded.Store(true)
}

func (t *turn) push(packet []byte) {
	n := len(t.chunks)
	if n == 0 || chunkSize-t.chunks[n-1].to < len(packet)+2 {
		c := chunks.Get().(*chunk)
		c.from, c.to = 0, 0
		t.chunks = append(t.chunks, c)
		n++
	}
	c := t.chunks[n-1]
	binary.BigEndian.PutUint16(c.data[c.to:], uint16(len(packet)))
	c.to += 2 + copy(c.data[c.to+2:], packet)
	t.bytes += len(packet)
}

// pop copies the first packet into buf. It fits: it came from a buffer of that size.
func (t *turn) pop(buf []byte) int {
	c := t.chunks[0]
	size := int(binary.BigEndian.Uint16(c.data[c.from:]))
	n := copy(buf, c.data[c.from+2:][:size])
	c.from += 2 + size
	t.bytes -= size
	if c.from == c.to {
		t.free(1)
	}
	return n
}

// free lets go of the first chunks.
func (t *turn) free(n int) {
	for _, c := range t.chunks[:n] {
		chunks.Put(c)
	}
	left := copy(t.chunks, t.chunks[n:])
	clear(t.chunks[left:])
	t.chunks = t.chunks[:left]
	if left == 0 && cap(t.chunks) > 64 {
		t.chunks = nil
	}
}

// enqueue gives a peer a turn if something of it waits that may go. mu is held.
func (ts *turns) enqueue(t *turn) {
	if t.queued || t.bytes == 0 || t.inside >= ts.share(t) {
		return
	}
	t.queued, t.next = true, nil
	t.deficit = min(t.deficit, 0) + turnQuantum
	if ts.head == nil {
		ts.head = t
	} else {
		ts.tail.next = t
	}
	ts.tail = t
}

// dequeue takes the first peer out. mu is held.
func (ts *turns) dequeue() {
	t := ts.head
	if ts.head = t.next; ts.head == nil {
		ts.tail = nil
	}
	t.queued, t.next = false, nil
}

// take gives packets whose turn it is to the device.
func (ts *turns) take(bufs [][]byte, sizes []int, eps []conn.Endpoint) (n int) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	now := time.Now()
	if now.Sub(ts.looked) >= insideStall/10 { // also while others' packets come out, or somebody would have no turn as long as they do
		ts.expire(now)
	}
	for most := min(len(bufs), takeMost); n < most && ts.head != nil && ts.inside < insideLimit; {
		t := ts.head
		was := t.isBusy()
		keys := ts.keys[:0]
		for room := min(most, n+ts.share(t)-t.inside); n < room && t.bytes > 0 && t.deficit > 0; n++ {
			sizes[n], eps[n] = t.pop(bufs[n]), t.peer
			if ts.bytes -= sizes[n]; isData(bufs[n][:sizes[n]]) {
				keys = append(keys, flightKey(bufs[n]))
			}
			t.deficit -= sizes[n] + packetCost
		}
		ts.note(t, was)
		ts.enter(t, keys, now)
		if n < most || t.bytes == 0 || t.deficit <= 0 {
			ts.dequeue()
			ts.enqueue(t)
		}
	}
	ts.crowded.Store(ts.bytes > 0)
	return n
}

// await returns when the device may have room, or after turnWait. timer belongs to the caller.
func (ts *turns) await(timer *time.Timer) {
	timer.Reset(turnWait)
	defer timer.Stop()
	select {
	case <-ts.room:
	case <-timer.C:
		ts.writeOff(time.Now())
	}
}

// writeOff makes room where packets have not come out of the device for long.
func (ts *turns) writeOff(now time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.expire(now)
}

// expire is writeOff with mu held.
func (ts *turns) expire(now time.Time) {
	ts.looked = now
	for t := range ts.flying {
		if now.Sub(t.moved) < insideStall {
			continue
		}
		was := t.isBusy()
		t.lost = true
		ts.now(t, 0)
		ts.note(t, was)
		ts.enqueue(t)
	}
}

// forget drops what waits of a peer that has gone.
func (ts *turns) forget(p *Peer) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := &p.turn
	was := t.isBusy()
	ts.bytes -= t.bytes
	t.free(len(t.chunks))
	t.bytes, t.gone = 0, true
	ts.now(t, 0)
	ts.note(t, was)
	ts.crowded.Store(ts.bytes > 0)
}

// waits is how many bytes wait.
func (ts *turns) waits() int {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.bytes
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
