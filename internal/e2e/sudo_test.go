//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// asUser makes the machine one like GitHub's own: steps run as an ordinary user, who may use sudo and is not asked for a password. It gives
// the path of an action that this user can read.
func (m *machine) asUser(t *testing.T) (action string) {
	t.Helper()
	program(t, "sudo")
	if err := os.Chown(m.home, lab.UnprivilegedID, lab.UnprivilegedID); err != nil {
		lab.Skip(t, "there is one user only: %v", err)
	}
	dir, err := scratch("culvert-etc-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	passwd, err := os.ReadFile("/etc/passwd")
	must(t, err)
	passwd = fmt.Appendf(passwd, "runner:*:%d:%d::%s:/bin/sh\n", lab.UnprivilegedID, lab.UnprivilegedID, m.home)
	must(t, os.WriteFile(filepath.Join(dir, "passwd"), passwd, 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "sudoers"), []byte("Defaults env_reset\nrunner ALL=(ALL) NOPASSWD:ALL\n"), 0o440))
	name, err := os.Hostname()
	must(t, err)
	hosts, err := os.ReadFile(m.file("hosts"))
	must(t, err)
	must(t, os.WriteFile(m.file("hosts"), fmt.Appendf(hosts, "127.0.1.1 %s\n", name), 0o644)) // sudo looks for itself
	must(t, os.CopyFS(filepath.Join(dir, "action"), os.DirFS(m.action)))
	own := *m.actions
	own.act, err = m.Publish(m.act)
	must(t, err)
	node, err := m.Publish(filepath.Join(m.node, "node"))
	must(t, err)
	own.node = filepath.Dir(node)
	m.actions, m.user, m.etc = &own, true, dir
	return filepath.Join(dir, "action")
}

// give makes everything on the machine its user's.
func (m *machine) give(t testing.TB) {
	t.Helper()
	must(t, filepath.WalkDir(m.home, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, lab.UnprivilegedID, lab.UnprivilegedID)
	}))
}

// An ordinary user with sudo gets a tunnel for all programs, as root does, and it goes with the job. A job that is cancelled while it joins
// leaves nothing, whoever runs it.
func TestWorkflowsWithSudo(t *testing.T) {
	a := newActions(t, stage.Options{})
	h := newHanging(t, a.Stage)
	t.Run("sudo", func(t *testing.T) {
		m := a.machine(t, "sudo", nil, nil)
		action := m.asUser(t)
		before := m.state(t)
		steps := []string{"test $(id -u) != 0", `psql -h db.internal -At -c "select 'answer', 6*7"`}
		code, log := m.begin(t, a.workflow("", steps...), action).end(t)
		if code != 0 || !strings.Contains(log, "answer|42") || !strings.Contains(log, "Success - Post culvertnet/culvert@v1") ||
			strings.Contains(log, "::warning") || strings.Contains(log, "eyJ") {
			t.Errorf("exit code %d\n%s", code, log)
		}
		m.clean(t, before)
	})
	for _, name := range []string{"cancelled as root", "cancelled under sudo"} {
		t.Run(name, func(t *testing.T) {
			m, action := a.machine(t, strings.ReplaceAll(name, " ", "-"), nil, nil), a.action
			if strings.HasSuffix(name, "sudo") {
				action = m.asUser(t)
			}
			before, came := m.state(t), h.token.Load()
			run := m.begin(t, a.workflow(""), action, fmt.Sprintf("ACTIONS_ID_TOKEN_REQUEST_URL=http://%s:%d/?a=b", a.IssuerHost.Addr(), portToken))
			eventually(t, time.Minute, "a question for the token", func() error {
				if h.token.Load() == came {
					return fmt.Errorf("nobody came\n%s", run.output(t))
				}
				return nil
			})
			must(t, run.proc.Signal(syscall.SIGINT))
			code, log := run.end(t)
			if code == 0 || !strings.Contains(log, "Success - Post culvertnet/culvert@v1") {
				t.Errorf("exit code %d\n%s", code, log)
			}
			m.clean(t, before)
		})
	}
}
