package tunnel

import "sync"

// Bounds of what all birthdays of a process do at once: a gateway's firewall keeps an entry for each probe, and each socket
// is a file descriptor that flows cannot have.
const (
	crowdRounds  = 4    // sessions that probe at the same time: 1,800 probes a second
	crowdSockets = 4096 // beside the tunnel's own, at most …
	crowdShare   = 4    // … and no more than one of so many file descriptors that the process may have
)

// crowd bounds birthdays.
type crowd struct {
	most int // sockets

	mu      sync.Mutex
	rounds  int
	sockets int
}

func newCrowd() *crowd { return &crowd{most: min(crowdSockets, Descriptors()/crowdShare)} }

// enter lets one more round begin and grants it sockets, as many as are wanted or what is left of them. It is false where there is no
// room.
func (c *crowd) enter(want int) (got int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	got = min(want, c.most-c.sockets)
	if c.rounds >= crowdRounds || got < min(want, birthdayFewest) {
		return 0, false
	}
	c.rounds++
	c.sockets += got
	return got, true
}

// leave ends a round. Its sockets are given back one by one.
func (c *crowd) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rounds--
}

// gone gives sockets back.
func (c *crowd) gone(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sockets -= n
}
