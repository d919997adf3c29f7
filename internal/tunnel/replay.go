package tunnel

// replay remembers which of the other side's checks have been seen, by their numbers, as RFC 6479 does for packets. Whoever has
// listened in can send a check again, from any address: it must draw no check, no answer, and move nothing.
type replay struct {
	newest uint64
	seen   [replayWords]uint64 // one bit for each of the latest numbers, by number modulo their count
}

// replayWords times 64 is how far back numbers are told apart. Checks on a slow path arrive after later ones on a fast path: at
// 500 a second, the most that are ever sent, by four seconds.
const replayWords = 32

const replayBits = replayWords * 64

// fresh reports whether a number has not been seen, and notes it. A number that is too old to tell has been seen, and so has zero.
func (r *replay) fresh(n uint64) bool {
	if n == 0 || n+replayBits <= r.newest {
		return false
	}
	if n > r.newest {
		if n-r.newest >= replayBits {
			r.seen = [replayWords]uint64{}
		} else {
			for i := r.newest + 1; i <= n; i++ {
				r.seen[i/64%replayWords] &^= 1 << (i % 64)
			}
		}
		r.newest = n
	}
	word, bit := &r.seen[n/64%replayWords], uint64(1)<<(n%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}
