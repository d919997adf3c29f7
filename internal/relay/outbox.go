package relay

import (
	"sync"
	"sync/atomic"
	"time"
)

// outbox holds what waits to be written on one WebSocket: a bounded queue for each channel, served by deficit round
// robin (Shreedhar and Varghese, 1995), and STUN messages before all of them. Putting never blocks; what finds its queue
// full is dropped and counted. An idle channel takes no memory.
//
//	put ──► flow ──► chunk, chunk, …   ┐
//	put ──► flow ──► chunk             ├─ take: one message ──► writer ──► release
//	control ───────────────────────────┘
type outbox struct {
	perFlow int // bytes that one channel may have waiting
	total   int // and all of them
	wake    chan struct{}
	asleep  atomic.Bool // nobody waits for wake, see writer
	rouse   func()      // has somebody do so

	mu      sync.Mutex
	flows   map[Channel]*flow
	first   *flow // the ring that is served, in turn
	last    *flow
	spare   *flow // emptied ones, for use again
	waiting int   // bytes
	control []byte
	closed  bool

	dropped atomic.Uint64 // packets
}

// flow is one channel's queue. It is in the ring and in the map as long as it holds a chunk.
type flow struct {
	channel Channel
	head    *chunk
	tail    *chunk
	waiting int
	deficit int
	freed   chan struct{} // closed once there is room; nil unless somebody waits for it
	next    *flow
}

// chunk is a piece of a message, in the message's format, with headroom before it so that it can be sent as it is.
type chunk struct {
	buf    []byte
	block  int // where the last block's header is
	size   int // that block's segment size; 0 where nothing can be added to it
	frames int // bytes of frames in it
	next   *chunk
}

const (
	smallChunk = 4 << 10
	largeChunk = headroom + BlockHeader + maxRun
	maxRun     = 1 << 16  // bytes of frames that are taken at a time
	quantum    = 16 << 10 // bytes a turn
	fullWrite  = 48 << 10 // from here on a message is large enough
	maxControl = 16 << 10 // bytes of STUN messages that may wait
)

var (
	smallChunks = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, smallChunk)} }}
	largeChunks = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, largeChunk)} }}
)

// gathers are buffers that hold whatever [outbox.take] gathers.
var gathers = sync.Pool{New: func() any { b := make([]byte, headroom, maxControl+fullWrite+largeChunk); return &b }}

func newChunk(pool *sync.Pool) *chunk {
	c := pool.Get().(*chunk)
	*c = chunk{buf: c.buf[:headroom]}
	return c
}

func (c *chunk) free() {
	if cap(c.buf) == largeChunk {
		largeChunks.Put(c)
	} else {
		smallChunks.Put(c)
	}
}

// begin starts a block.
func (c *chunk) begin(segment int) {
	c.block, c.size = len(c.buf), segment
	c.buf = AppendBlockHeader(c.buf, 0, segment)
}

// grown accounts for n bytes that were added to the last block. A shorter frame ends it.
func (c *chunk) grown(n int) {
	c.frames += n
	putBlockLength(c.buf[c.block:], len(c.buf)-c.block-BlockHeader)
	if n%c.size != 0 {
		c.size = 0
	}
}

// takes reports whether n bytes of frames of size segment can be added to the last block.
func (c *chunk) takes(n, segment int) bool {
	return len(c.buf)+n <= cap(c.buf) && (c.size == segment || c.size > segment && n == segment)
}

func newOutbox(perFlow, total int) *outbox {
	return &outbox{perFlow: perFlow, total: total, wake: make(chan struct{}, 1), flows: map[Channel]*flow{}}
}

// putRun queues a run of frames of one channel, headers included, and reports whether it was taken.
func (o *outbox) putRun(c Channel, run []byte, segment int) bool {
	o.mu.Lock()
	f := o.admit(c, len(run))
	if f == nil || len(run) > maxRun {
		o.mu.Unlock()
		o.dropped.Add(uint64((len(run) + segment - 1) / segment))
		return false
	}
	k := f.room(len(run), segment)
	k.buf = append(k.buf, run...)
	o.added(f, k, len(run))
	o.mu.Unlock()
	o.signal()
	return true
}

// putPackets queues packets of one channel and gives how many were taken; the rest is dropped.
func (o *outbox) putPackets(c Channel, packets [][]byte) (taken int) {
	o.mu.Lock()
	for _, p := range packets {
		n := FrameHeader + len(p)
		if len(p) == 0 || n > MaxFrame {
			continue
		}
		f := o.admit(c, n)
		if f == nil {
			break
		}
		k := f.room(n, n)
		at := len(k.buf)
		k.buf = append(k.buf[:at+FrameHeader], p...)
		PutHeader(k.buf[at:], c)
		o.added(f, k, n)
		taken++
	}
	o.mu.Unlock()
	o.dropped.Add(uint64(len(packets) - taken))
	if taken > 0 {
		o.signal()
	}
	return taken
}

// wait returns when a channel has room for another run, or the timer has fired.
func (o *outbox) wait(c Channel, timer <-chan time.Time) {
	for {
		room := o.room(c)
		if room == nil {
			return
		}
		select {
		case <-room:
		case <-timer:
			return
		}
	}
}

// room gives a channel that is closed once a flow has room for another run; nil where it has some now, or the outbox is closed.
func (o *outbox) room(c Channel) <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.flows[c]
	if f == nil || o.fits(f) {
		return nil
	}
	if f.freed == nil {
		f.freed = make(chan struct{})
	}
	return f.freed
}

// fits reports whether a flow has room for another run.
func (o *outbox) fits(f *flow) bool { return f.waiting+maxRun <= o.perFlow }

// putControl queues one STUN message and reports whether it was taken.
func (o *outbox) putControl(msg []byte) bool {
	o.mu.Lock()
	ok := !o.closed && len(o.control)+BlockHeader+len(msg) <= maxControl
	if ok {
		o.control = append(AppendBlockHeader(o.control, len(msg), 0), msg...)
	}
	o.mu.Unlock()
	if ok {
		o.signal()
	}
	return ok
}

// admit gives the channel's queue if n more bytes fit, nil if not.
func (o *outbox) admit(c Channel, n int) *flow {
	if o.closed || o.waiting+n > o.total {
		return nil
	}
	f := o.flows[c]
	if f != nil {
		if f.waiting+n > o.perFlow {
			return nil
		}
		return f
	}
	if f = o.spare; f != nil {
		o.spare = f.next
	} else {
		f = &flow{}
	}
	*f = flow{channel: c}
	o.flows[c] = f
	if o.first == nil {
		o.first = f
	} else {
		o.last.next = f
	}
	o.last = f
	return f
}

// room gives a chunk with room for n bytes of frames of size segment, in a block that takes them.
func (f *flow) room(n, segment int) *chunk {
	k := f.tail
	if k != nil && k.takes(n, segment) {
		return k
	}
	if k == nil || len(k.buf)+BlockHeader+n > cap(k.buf) {
		pool := &largeChunks
		if k == nil && headroom+BlockHeader+n <= smallChunk {
			pool = &smallChunks // most often nothing follows
		}
		k = newChunk(pool)
		if f.tail == nil {
			f.head = k
		} else {
			f.tail.next = k
		}
		f.tail = k
	}
	k.begin(segment)
	return k
}

// added accounts for n bytes that were added to k.
func (o *outbox) added(f *flow, k *chunk, n int) {
	k.grown(n)
	f.waiting += n
	o.waiting += n
}

// signal wakes the writer.
func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
	if o.asleep.Load() && o.asleep.CompareAndSwap(true, false) {
		o.rouse()
	}
}

// take gives the next message with headroom before it, nil where nothing waits: one chunk as it is, to be freed once it
// is written, or several gathered in buf.
func (o *outbox) take(buf []byte) (msg []byte, whole *chunk) {
	o.mu.Lock()
	defer o.mu.Unlock()
	msg = append(buf[:headroom], o.control...)
	o.control = o.control[:0]
	for o.first != nil && len(msg) < fullWrite {
		k := o.pop()
		if len(msg) == headroom && (len(k.buf) >= fullWrite || o.first == nil) {
			return k.buf, k
		}
		msg = append(msg, k.buf[headroom:]...)
		k.free()
	}
	if len(msg) == headroom {
		return nil, nil
	}
	return msg, nil
}

// pop takes the chunk whose turn it is, where something waits.
func (o *outbox) pop() *chunk {
	f := o.first
	for f.deficit < f.head.frames {
		f.deficit += quantum
		if f != o.last {
			o.first, o.last.next, o.last, f.next = f.next, f, f, nil
			f = o.first
		}
	}
	k := f.head
	f.deficit -= k.frames
	f.waiting -= k.frames
	o.waiting -= k.frames
	if f.freed != nil && o.fits(f) {
		close(f.freed)
		f.freed = nil
	}
	if f.head = k.next; f.head == nil {
		o.retire(f)
	}
	return k
}

// retire removes an emptied queue, which is the first.
func (o *outbox) retire(f *flow) {
	delete(o.flows, f.channel)
	if o.first = f.next; o.first == nil {
		o.last = nil
	}
	f.next, f.tail, o.spare = o.spare, nil, f
}

// drain writes what is put until stop is closed or a write fails. It counts the bytes. One goroutine runs it.
func (o *outbox) drain(to *socket, stop <-chan struct{}, written *atomic.Uint64) (err error) {
	for err == nil {
		select {
		case <-stop:
			return nil
		case <-o.wake:
			err = o.flush(to, written)
		}
	}
	return err
}

// flush writes all that waits.
func (o *outbox) flush(to *socket, written *atomic.Uint64) error {
	gather := gathers.Get().(*[]byte)
	defer gathers.Put(gather)
	for {
		msg, whole := o.take(*gather)
		if msg == nil {
			return nil
		}
		written.Add(uint64(len(msg) - headroom))
		err := to.writeMessage(msg)
		if whole != nil {
			whole.free()
		}
		if err != nil {
			return err
		}
	}
}

// close drops what waits and takes nothing more.
func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed, o.control = true, nil
	for o.first != nil {
		o.pop().free()
	}
}
