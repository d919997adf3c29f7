package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"

	"github.com/culvertnet/culvert/internal/wire"
)

// natsServer is a cluster of one that several coordinators share.
func natsServer(t *testing.T) string {
	t.Helper()
	srv, err := natsserver.NewServer(&natsserver.Options{
		Host: "127.0.0.1", Port: natsserver.RANDOM_PORT, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(),
		JetStreamMaxMemory: 64 << 20, JetStreamMaxStore: 256 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(time.Minute) {
		t.Fatal("the nats server does not start")
	}
	return srv.ClientURL()
}

// twoNodes are two coordinators with the same issuers, rules and state, and a file each.
func twoNodes(t *testing.T, opts Options) (a, b *rig) {
	t.Helper()
	url := natsServer(t)
	a = newRigOf(t, opts, func(doc string) string {
		return strings.Replace(doc, "state: {dir: state}", "audit: {max_size: 64MiB}\nstate: {nats: ['"+url+"']}", 1)
	})
	twin := *a
	b = &twin
	b.log, b.server, b.file = &syncBuffer{}, nil, filepath.Join(t.TempDir(), "culvert.yaml")
	b.write(b.doc)
	b.start()
	t.Cleanup(b.stop)
	return a, b
}

// A session ends within seconds of a policy that no longer gives what it holds, whichever coordinator took it in, holds its
// gateway's stream or reads the file.
func TestPolicyReachesSessionsOfOtherNodes(t *testing.T) {
	a, b := twoNodes(t, Options{Reload: 50 * time.Millisecond})
	g := b.gateway()
	a.eventually("a sees b's gateway", func() bool { return len(a.server.store.Gateways("corp")) == 1 })
	joined, other := a.job().mustJoin(), b.job()
	other.claims["ref"] = "refs/heads/main"
	stays := other.mustJoin()
	for _, r := range []*rig{a, b} {
		r.eventually("the mirror has both", func() bool { return r.server.sessions.Held(hello("east").Instance) == 2 })
	}
	narrower := strings.Replace(a.doc, "    match: {repository_owner_id: 9919,", "    match: {sub: none, repository_owner_id: 9919,", 1)
	began := time.Now()
	a.write(narrower) // b's file stays as it is
	a.eventually("both sessions are over", func() bool { return len(g.Frames(wire.FrameEnd)) == 2 })
	t.Logf("it took %s with a file that is looked at every 50 ms", time.Since(began).Round(time.Millisecond))
	for _, id := range []string{joined.ID, stays.ID} {
		l, err := b.server.store.Lease(t.Context(), id)
		if err != nil || l.Over == "" {
			t.Errorf("lease %+v, %v", l, err)
		}
	}
}

func TestWatcherSeesIncludedFiles(t *testing.T) {
	dir := t.TempDir()
	main := filepath.Join(dir, "culvert.yaml")
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("culvert.yaml", "include: [rules.d, one.yaml]\n")
	write("rules.d/a.yaml", "rules: []\n")
	w := newWatcher(main)
	for _, step := range []struct {
		name string
		do   func()
		want bool
	}{
		{"nothing", func() {}, false},
		{"a file's content, of equal size", func() { write("rules.d/a.yaml", "rulez: []\n") }, true},
		{"touched alone", func() { write("rules.d/a.yaml", "rulez: []\n") }, false},
		{"a new file", func() { write("rules.d/b.yaml", "") }, true},
		{"a new file of no concern", func() { write("rules.d/README.md", "x") }, false},
		{"a named file that was missing", func() { write("one.yaml", "") }, true},
		{"a file gone", func() { _ = os.Remove(filepath.Join(dir, "rules.d/b.yaml")) }, true},
		{"the configuration broken", func() { write("culvert.yaml", "include: [") }, true},
		{"the configuration away", func() { _ = os.Remove(main) }, false},
		{"and back", func() { write("culvert.yaml", "include: [rules.d, one.yaml]\n") }, true},
		{"still", func() {}, false},
	} {
		step.do()
		if got := w.changed(); got != step.want {
			t.Errorf("%s: changed is %v", step.name, got)
		}
	}
}

// Rules in an included file are taken up like those of the configuration itself.
func TestReloadTakesUpIncludedFiles(t *testing.T) {
	r := newRigOf(t, Options{Reload: 50 * time.Millisecond}, func(doc string) string {
		head, _, _ := strings.Cut(doc, "rules:")
		return head + "include: rules.d\n"
	}, "rules.d/a.yaml", "rules: [{name: a, match: {repository_owner_id: 9919}, allow: ['tcp 10.20.0.5:5432']}]\n")
	g := r.gateway()
	r.job().mustJoin()
	r.eventually("the mirror has it", func() bool { return r.server.sessions.Held(hello("east").Instance) == 1 })
	file := filepath.Join(filepath.Dir(r.file), "rules.d", "a.yaml")
	if err := os.WriteFile(file, []byte("rules: ["), 0o600); err != nil {
		t.Fatal(err)
	}
	r.eventually("the broken file is refused loudly", func() bool { return strings.Contains(r.log.String(), "is refused and the old one stays") })
	r.job().mustJoin()
	if err := os.WriteFile(file, []byte("rules: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.eventually("both sessions are over", func() bool { return len(g.Frames(wire.FrameEnd)) == 2 })
	if _, err := r.job().join(); err == nil {
		t.Error("a job gets in though no rule is left")
	}
}
