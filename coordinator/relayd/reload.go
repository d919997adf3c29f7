package relayd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"io"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// watcher finds out whether the content of a file changed. It polls, because what mounts files into containers swaps links
// where notifications do not see it.
type watcher struct {
	file string
	sum  [sha256.Size]byte
}

// changed reports whether the content differs from when it was last asked. A file that is away has not changed.
func (w *watcher) changed() bool {
	f, err := os.Open(w.file)
	if err != nil {
		return false
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, yamlfile.MaxSize+1))
	if err != nil {
		return false
	}
	before := w.sum
	w.sum = sha256.Sum256(data)
	return w.sum != before
}

// reloadLoop takes up changes of the configuration file until ctx ends; a hangup asks for it at once.
func (s *Server) reloadLoop(ctx context.Context, w *watcher) {
	tick := time.NewTicker(s.opts.Reload)
	defer tick.Stop()
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-hangup:
			w.changed() // so that the next tick does not do it again
			s.reload()
		case <-tick.C:
			if s.certs != nil {
				s.certs.Look()
			}
			if w.changed() {
				s.reload()
			}
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the file again and takes its keys. A broken file is refused and the old one stays in force. All else is fixed
// until a restart.
func (s *Server) reload() {
	next, err := config.LoadStandalone(s.config.File)
	if err == nil {
		err = s.relay.SetKeys(next.TicketKeys)
	}
	if err != nil {
		s.log.Error("the changed configuration is refused and the old one stays in force", "code", problem.CodeOf(err), "err", err)
		return
	}
	old := *s.config
	if !slices.EqualFunc(old.TicketKeys, next.TicketKeys, func(a, b ed25519.PublicKey) bool { return bytes.Equal(a, b) }) {
		s.log.Info("the coordinators' keys have changed", "coordinators", len(next.TicketKeys))
	}
	old.TicketKeys = next.TicketKeys
	s.config = &old
	if !reflect.DeepEqual(&old, next) {
		s.log.Warn("all changes but those of ticket_keys wait for a restart")
	}
}
