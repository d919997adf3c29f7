package server

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// watcher finds out whether the content of the configuration changed, or of any file that it includes. It polls, because
// what mounts files into containers swaps links where notifications do not see it.
type watcher struct {
	file     string
	main     [sha256.Size]byte // of the configuration itself
	includes []string          // of the configuration as main says
	seen     map[string]version
	sum      [sha256.Size]byte // of all files
}

// version is what is known of one file.
type version struct {
	mtime time.Time
	size  int64
	sum   [sha256.Size]byte
}

func newWatcher(file string) *watcher {
	w := &watcher{file: file}
	w.changed()
	return w
}

// changed reports whether the content differs from when it was last asked. A configuration that is away has not changed.
func (w *watcher) changed() bool {
	data, err := readBounded(w.file)
	if err != nil {
		return false
	}
	if sum := sha256.Sum256(data); sum != w.main {
		w.main, w.includes = sum, config.Includes(w.file, data)
	}
	all := sha256.New()
	all.Write(w.main[:])
	seen := map[string]version{}
	for _, file := range config.Expand(w.includes) {
		v, err := versionOf(file, w.seen[file])
		if err == nil {
			seen[file] = v
		}
		fmt.Fprintf(all, "%q %v %x\n", file, err, v.sum)
	}
	before := w.sum
	w.seen, w.sum = seen, [sha256.Size]byte(all.Sum(nil))
	return w.sum != before
}

// versionOf looks at a file, and reads it unless it is surely as it was.
func versionOf(file string, last version) (version, error) {
	info, err := os.Stat(file)
	if err != nil {
		return version{}, err
	}
	if info.ModTime().Equal(last.mtime) && info.Size() == last.size && settled(info.ModTime()) {
		return last, nil
	}
	data, err := readBounded(file)
	if err != nil {
		return version{}, err
	}
	return version{info.ModTime(), info.Size(), sha256.Sum256(data)}, nil
}

func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, yamlfile.MaxSize+1))
}

// settled reports whether a file's time is old enough that a second write would have given it another one.
func settled(mtime time.Time) bool { return time.Since(mtime) > 2*time.Second }

// reloadLoop takes up changes of the configuration file until ctx ends; a hangup asks for it at once.
func (s *Server) reloadLoop(ctx context.Context) {
	tick := time.NewTicker(s.opts.Reload)
	defer tick.Stop()
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-hangup:
			s.reopenCopy()
			s.watch.changed() // so that the next tick does not do it again
			_ = s.Reload(ctx)
		case <-tick.C:
			if s.certs != nil {
				s.certs.Look()
			}
			if s.watch.changed() {
				_ = s.Reload(ctx) // logged there; the old configuration stays
			}
		case <-ctx.Done():
			return
		}
	}
}

// expireLoop ends what sessions hold by a rule that expires, until ctx ends.
func (s *Server) expireLoop(ctx context.Context) {
	tick := time.NewTicker(DefaultReload)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		if at, ok := s.sessions.Rules().Config.Policy.NextExpiry(last); ok && !now.Before(at) {
			s.log.Info("a rule has expired", "at", at)
			s.sessions.Reevaluate(ctx)
		}
		last = now
	}
}

// Reload reads the configuration file again and puts it into force. A broken one is refused and the old one stays. Where
// the server listens and keeps its state is fixed until a restart.
func (s *Server) Reload(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := config.Load(s.config.File)
	if err == nil {
		err = s.take(ctx, next)
	}
	s.metrics.took(err)
	if err != nil {
		s.log.Error("the changed configuration is refused and the old one stays in force", "code", problem.CodeOf(err), "err", err)
		return err
	}
	s.log.Info("the changed configuration is in force", "rules", len(next.Rules), "networks", next.NetworkNames())
	return nil
}

// take replaces what a reload may replace. Verifiers whose issuers stay the same are kept, and their keys with them.
func (s *Server) take(ctx context.Context, next *config.Config) error {
	if fixed := needRestart(s.opts.Config, next); len(fixed) > 0 {
		s.log.Warn("some changes wait for a restart", "keys", fixed)
		next.URL = s.config.URL // the audience of every token that is on its way
		next.Relay = s.config.Relay
	}
	oldJobs, oldIdentities := s.jobs, s.identities
	jobs, ids := oldJobs, oldIdentities
	var err error
	if s.config.InsecureHTTP != next.InsecureHTTP || !slices.Equal(s.config.Issuers, next.Issuers) {
		if jobs, err = verifier(next.Issuers, next, s.log); err != nil {
			return err
		}
	}
	if s.config.InsecureHTTP != next.InsecureHTTP || !slices.Equal(s.config.GatewayIssuers(), next.GatewayIssuers()) {
		if ids, err = identities(next, s.log); err != nil {
			retire(jobs, oldJobs)
			return err
		}
	}
	s.recordPolicy(ctx, policyRecord(s.config, next))
	s.config, s.jobs, s.identities = next, jobs, ids
	s.api.SetRules(s.apiRules())
	s.private.secret.Store(&next.Private.SecretSHA256)
	s.sessions.SetRules(ctx, s.sessionRules())
	retire(oldJobs, jobs)
	retire(oldIdentities, ids)
	return nil
}

// retire closes a verifier unless it stays in use. Verifications in progress end with the keys that it has.
func retire(v, kept *claims.Verifier) {
	if v != nil && v != kept {
		_ = v.Close()
	}
}

// needRestart names the keys of b that are others than those of a, with which the server started, and cannot be taken up while running.
func needRestart(a, b *config.Config) []string {
	var out []string
	for _, c := range []struct {
		key  string
		a, b any
	}{
		{"url", a.URL, b.URL}, {"listen", a.Listen, b.Listen}, {"udp", a.UDP, b.UDP}, {"probe", a.Probe, b.Probe}, {"relay", a.Relay, b.Relay}, {"tls", a.TLS, b.TLS}, {"acme", a.ACME, b.ACME},
		{"trusted_proxies", a.TrustedProxies, b.TrustedProxies}, {"state", a.State, b.State},
		{"audit", a.Audit, b.Audit}, {"private.listen", a.Private.Listen, b.Private.Listen}, {"limits", a.Limits, b.Limits},
	} {
		if !reflect.DeepEqual(c.a, c.b) {
			out = append(out, c.key)
		}
	}
	return out
}
