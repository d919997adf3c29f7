package server

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notify tells systemd how the program is (sd_notify(3)), where systemd started it.
func (s *Server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("systemd is not told", "state", state, "err", err)
	}
}

// watchdog tells systemd again and again that the program serves, where the unit asks for that (WatchdogSec=), until ctx ends. A
// state that is away is no reason to be killed: it would not come back by that.
func (s *Server) watchdog(ctx context.Context) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every <= 0 {
		return
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.mu.Lock() // whoever holds it for long is what the watchdog is for
			s.notify(daemon.SdNotifyWatchdog)
			s.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// drain goes on serving for a while, so that a load balancer which asks /readyz sends nothing more before anything is refused. An
// error is what broke meanwhile.
func (s *Server) drain() error {
	if s.opts.Drain <= 0 {
		return nil
	}
	s.api.Leave()
	select {
	case <-time.After(s.opts.Drain):
		return nil
	case err := <-s.Failed():
		return err
	}
}
