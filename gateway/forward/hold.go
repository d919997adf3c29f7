package forward

import (
	"time"

	"github.com/culvertnet/culvert/internal/policy"
)

// reasonHeld is why a new flow of a session that is on its way to another gateway does not begin. The job is not told: it asks
// again, and by then the other gateway answers.
const reasonHeld = "the session moves to another gateway"

// Connections counts the session's open TCP connections, but for those to the gateway itself.
func (s *Session) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.connections()
}

// connections is Connections with mu held.
func (s *Session) connections() (n int) {
	for key, fl := range s.flows {
		if key.proto == policy.TCP && !fl.served {
			n++
		}
	}
	return n
}

// HoldIfQuiet keeps new flows from beginning for a while, unless there are open TCP connections, whose number it returns. So a
// session that goes elsewhere in that time cuts none.
func (s *Session) HoldIfQuiet(d time.Duration) (connections int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.connections(); n > 0 {
		return n
	}
	s.heldUntil = time.Now().Add(d)
	return 0
}

// waits says that a new flow does not begin now. mu is held.
func (s *Session) waits(served bool) bool {
	return !served && !s.heldUntil.IsZero() && time.Now().Before(s.heldUntil)
}
