package forward

import (
	"errors"
	"time"
)

// Limits bound what one session and the process may do.
type Limits struct {
	SessionFlows   int   // open flows of one session, connections to the gateway itself included; default 4096
	SessionRate    int   // new flows a second of one session, with a burst of as many; default 1000
	SessionBytes   int64 // buffers of one session beyond a floor for each flow, see [purse]; default 64 MiB
	SessionNames   int   // names under wildcards that one session may use in its whole life; default 1024
	SessionQueries int   // DNS questions a second of one session, with a burst of as many; default 200
	SessionServed  int   // connections of one session to the gateway's own services; default 16
	// TotalFlows bounds open flows in all; default [DefaultTotalFlows]. Each takes a file descriptor. The last quarter is for sessions with less than an equal share.
	TotalFlows  int
	TotalBytes  int64         // buffers in all, beyond the floors; default 1 GiB
	DialTimeout time.Duration // names included; default 10 s
	UDPIdle     time.Duration // default 60 s; ICMP echo as well
	TCPIdle     time.Duration // default 2 h without data, whether or not keepalive probes are answered
}

// DefaultTotalFlows is how many flows are open in all unless somebody says otherwise.
const DefaultTotalFlows = 65536

func (l *Limits) validate() error {
	if l.SessionFlows < 0 || l.SessionRate < 0 || l.SessionBytes < 0 || l.SessionNames < 0 || l.SessionQueries < 0 || l.SessionServed < 0 ||
		l.TotalFlows < 0 || l.TotalBytes < 0 || l.DialTimeout < 0 || l.UDPIdle < 0 || l.TCPIdle < 0 {
		return errors.New("a limit on flows cannot be negative")
	}
	setDefault(&l.SessionFlows, 4096)
	setDefault(&l.SessionRate, 1000)
	setDefault(&l.SessionBytes, 64<<20)
	setDefault(&l.SessionNames, 1024)
	setDefault(&l.SessionQueries, 200)
	setDefault(&l.SessionServed, 16)
	setDefault(&l.TotalFlows, DefaultTotalFlows)
	setDefault(&l.TotalBytes, 1<<30)
	setDefault(&l.DialTimeout, 10*time.Second)
	setDefault(&l.UDPIdle, time.Minute)
	setDefault(&l.TCPIdle, 2*time.Hour)
	return nil
}

func setDefault[T int | int64 | time.Duration](v *T, to T) {
	if *v == 0 {
		*v = to
	}
}
