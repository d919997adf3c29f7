//go:build linux

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// runnerUser is a runner of a self-hosted machine, with a user of its own, from whom steps run culvert with sudo.
type runnerUser struct {
	*stage.Job
	uid  int
	as   []string // what runs a program as this user
	name string
}

// user gives a machine's user a job. What sudo does of it is played: the client is root's, and knows who called.
func user(t *testing.T, s *stage.Stage, uid int) *runnerUser {
	t.Helper()
	u := &runnerUser{Job: newJob(t, s, stage.JobOptions{}), uid: uid, name: fmt.Sprintf("runner-%d", uid)}
	u.Setenv("SUDO_UID", strconv.Itoa(uid))
	u.Setenv("RUNNER_ENVIRONMENT", "self-hosted")
	u.Setenv("CULVERT_NAME", u.name)
	id := strconv.Itoa(uid)
	u.as = []string{program(t, "setpriv"), "--reuid=" + id, "--regid=" + id, "--clear-groups", "--"}
	if err := exec.Command(u.as[0], append(u.as[1:], "true")...).Run(); err != nil {
		lab.Skip(t, "there is one user only: %v", err)
	}
	must(t, os.Chmod(u.Home(), 0o755))
	return u
}

// get fetches a page as this user, and says whether that worked.
func (u *runnerUser) get(t *testing.T, url string, more ...string) (string, bool) {
	t.Helper()
	line := append(append([]string{}, u.as...), append([]string{program(t, "curl"), "--silent", "--show-error", "--max-time", "20", url}, more...)...)
	result, err := u.Run(timeout(t, time.Minute), line[0], line[1:]...)
	must(t, err)
	return result.Stdout + result.Stderr, result.Code == 0
}

// Two jobs of two users at once on one self-hosted machine, one in each of two networks, and then both in the same: each reaches its own by
// name and address, neither the other's, neither sees or ends the other's tunnel. Root, as in the jobs' sudo, reaches both.
func TestUsersOfOneMachine(t *testing.T) {
	s := inTwo(t, stage.Options{})
	before := snapshot(t, s.Runner)
	alice, bob, carol := user(t, s, 3001), user(t, s, 3002), user(t, s, 3003)
	culvert(t, alice.Job, 0, "up", "--mode", "tun", "--network", stage.Network, "--wait-for", named()[0])
	culvert(t, bob.Job, 0, "up", "--mode", "tun", "--network", otherNetwork, "--wait-for", named()[1])
	at := [2]string{} // service addresses, as the one who may asks for them
	for i, u := range []*runnerUser{alice, bob} {
		got, ok := u.get(t, "http://"+named()[i], "--write-out", "%{remote_ip}")
		if at[i] = strings.TrimPrefix(got, stage.Greeting); !ok || at[i] == got {
			t.Fatalf("user %d gets from %s: %q", u.uid, named()[i], got)
		}
	}
	for _, c := range []struct {
		who *runnerUser
		of  int
	}{{alice, 1}, {bob, 0}, {carol, 0}, {carol, 1}} {
		if got, ok := c.who.get(t, "http://"+named()[c.of], "--resolve", named()[c.of]+":"+at[c.of]); ok || !strings.Contains(got, "Failed to connect") {
			t.Errorf("user %d gets from %s: %q", c.who.uid, named()[c.of], got)
		}
		host, _, _ := strings.Cut(named()[c.of], ":")
		line := append(append([]string{}, c.who.as...), "timeout", "0.4", "getent", "ahostsv4", host) // an answer would be there in milliseconds
		if result, err := c.who.Run(timeout(t, time.Minute), line[0], line[1:]...); err != nil || result.Code == 0 {
			t.Errorf("user %d looks %s up: %v, %s", c.who.uid, host, err, result)
		}
	}
	culvert(t, bob.Job, 0, "down")
	culvert(t, bob.Job, 0, "up", "--mode", "tun", "--network", stage.Network) // where alice is
	sent := func(u *runnerUser) uint64 {
		var status struct {
			TX uint64 `json:"tx_bytes"`
		}
		decode(t, culvert(t, u.Job, 0, "status", "--json").Stdout, &status)
		return status.TX
	}
	for _, u := range []*runnerUser{alice, bob} {
		wasAlice, wasBob := sent(alice), sent(bob)
		for range 8 {
			if got, ok := u.get(t, "http://"+named()[0]); !ok || got != stage.Greeting {
				t.Fatalf("user %d in one network with the other gets %q", u.uid, got)
			}
		}
		byAlice, byBob := sent(alice)-wasAlice, sent(bob)-wasBob
		if (u == alice) != (byAlice > byBob) {
			t.Errorf("user %d: %d bytes went through the first tunnel, %d through the second", u.uid, byAlice, byBob)
		}
	}
	if got, ok := carol.get(t, "http://"+named()[0], "--resolve", named()[0]+":"+at[0]); ok {
		t.Errorf("a user without a tunnel gets %q", got)
	}
	alice.Setenv("CULVERT_NAME", bob.name) // by name; as that user, not as root
	line := append(append([]string{}, alice.as...), s.Binary("culvert"), "down")
	if result, err := alice.Run(timeout(t, time.Minute), line[0], line[1:]...); err != nil || result.Code == 0 {
		t.Errorf("a user ends another's tunnel: %v, %s", err, result)
	}
	alice.Setenv("CULVERT_NAME", alice.name)
	culvert(t, alice.Job, 0, "down")
	culvert(t, bob.Job, 0, "down")
	unchanged(t, s.Runner, before)
}

// A job whose runner was killed leaves its tunnel. The next job of the same runner ends it before it joins; another runner's stays. What a
// killed client itself leaves, the rules of two users, is gone with the next tunnel as well.
func TestLeftoversOfDeadJobs(t *testing.T) {
	s := inTwo(t, stage.Options{})
	before := snapshot(t, s.Runner)
	job := newJob(t, s, stage.JobOptions{})
	join := func(name, of, network string) {
		t.Helper()
		culvert(t, job, 0, "up", "--mode", "tun", "--name", name, "--job", of, "--network", network)
	}
	join("corp-dead", "one/dead", stage.Network)
	join("lab-dead", "one/dead", otherNetwork)
	join("corp-else", "two/busy", stage.Network)
	join("corp-next", "one/next", stage.Network)
	for name, code := range map[string]int{"corp-dead": 1, "lab-dead": 1, "corp-else": 0, "corp-next": 0} {
		culvert(t, job, code, "status", "--name", name)
	}
	culvert(t, job, 0, "down", "--name", "corp-else,corp-next")
	alice, bob := user(t, s, 3001), user(t, s, 3002)
	for _, u := range []*runnerUser{alice, bob} {
		culvert(t, u.Job, 0, "up", "--mode", "tun", "--network", stage.Network)
	}
	for _, u := range []*runnerUser{alice, bob} {
		pid := clientPID(t, u.Job)
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		eventually(t, time.Minute, "the end of a client", func() error { return gone(pid) })
	}
	rules := func() string { return output(t, job, program(t, "ip"), "rule", "show") }
	if !strings.Contains(rules(), "uidrange 3001-3001") {
		t.Errorf("nothing is left to clear:\n%s", rules())
	}
	eventually(t, time.Minute, "the ends of the interfaces", func() error {
		if links := output(t, job, program(t, "ip"), "link", "show"); strings.Contains(links, "culvert") {
			return fmt.Errorf("%s", links)
		}
		return nil
	})
	join("corp", "", stage.Network)
	if strings.Contains(rules(), "uidrange") {
		t.Errorf("the next tunnel leaves the rules of dead ones:\n%s", rules())
	}
	culvert(t, job, 0, "down", "--name", "corp")
	unchanged(t, s.Runner, before)
}

// gone says whether a process still runs.
func gone(pid int) error {
	if err := syscall.Kill(pid, 0); err == nil {
		return fmt.Errorf("process %d runs", pid)
	}
	return nil
}

// A proxy, and a forward, serve nobody but their own user and root, though every user can connect to loopback.
func TestProxyServesItsUserAlone(t *testing.T) {
	s := setup(t, stage.Options{})
	job := newJob(t, s, stage.JobOptions{Unprivileged: true})
	r := up(t, job, "proxy", "--forward", "18081:"+s.Target(stage.PortHTTP))
	other := user(t, s, 3001)
	for _, ask := range [][]string{{"http://127.0.0.1:18081/"}, {"http://" + s.Target(stage.PortHTTP) + "/", "--proxy", "http://" + r.Proxy}, {"http://" + s.Target(stage.PortHTTP) + "/", "--proxy", "socks5h://" + r.Proxy}} {
		if got, ok := other.get(t, ask[0], ask[1:]...); ok {
			t.Errorf("another user gets %q by %v", got, ask)
		}
		own := append([]string{program(t, "curl"), "--silent", "--show-error", "--max-time", "20"}, ask...)
		if got := output(t, job, own[0], own[1:]...); got != stage.Greeting {
			t.Errorf("the tunnel's own user gets %q by %v", got, ask)
		}
	}
}
