package repair

// Count is how many packets there have been of a peer's transport messages: those that must have been sent, by their counters, and
// those that came. Both wrap around.
type Count struct {
	Sent uint32
	Came uint32
}

// Since gives what has been added since an earlier count. lost is never more than sent: packets that were late, or came twice, make up
// for others. ok is false where the older one is the newer one.
func (c Count) Since(old Count) (sent, lost uint32, ok bool) {
	sent, came := c.Sent-old.Sent, c.Came-old.Came
	if sent > 1<<31 || came > 1<<31 {
		return 0, 0, false
	}
	return sent, sent - min(came, sent), true
}

// Tally counts what comes from one peer, before anything is rebuilt. Whoever forges packets can make it wrong, and nothing else.
type Tally struct {
	count Count
	index uint32
	top   uint64
}

// jump is the largest gap that is believed; one that is larger counts as none.
const jump = 1 << 16

// Note counts a run of n transport messages of one key, whose counters lie between low and high.
func (t *Tally) Note(idx uint32, low, high uint64, n int) {
	switch {
	case idx != t.index || high > t.top+jump || high < low:
		t.index, t.top = idx, high
		t.count.Sent += uint32(min(high-low+1, jump, uint64(4*n)))
	case high > t.top:
		t.count.Sent += uint32(high - t.top)
		t.top = high
	}
	t.count.Came += uint32(n)
}

// Count gives what has been counted.
func (t *Tally) Count() Count { return t.count }

// Run is a run of packets as it is being read, for [Tally.Note] to be called once for many.
type Run struct {
	Index     uint32
	Low, High uint64
	N         int
}

// Add adds a packet that [IsTransport] has recognised. It is false where the packet is of another key and begins another run.
func (r *Run) Add(pkt []byte) bool {
	idx, c := index(pkt), counter(pkt)
	if r.N == 0 {
		*r = Run{Index: idx, Low: c, High: c, N: 1}
		return true
	}
	if idx != r.Index {
		return false
	}
	r.Low, r.High = min(r.Low, c), max(r.High, c)
	r.N++
	return true
}
