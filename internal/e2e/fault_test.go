//go:build linux

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// drip opens an answer of the service that never ends, and gives a function that wants more of it.
func drip(t *testing.T, s *stage.Stage) (more func()) {
	t.Helper()
	client := s.Client(s.Runner, 5*time.Minute)
	resp, err := client.Get("http://" + s.Target(stage.PortHTTP) + "/drip")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	body := bufio.NewReader(resp.Body)
	return func() {
		t.Helper()
		guard := time.AfterFunc(10*time.Second, func() { resp.Body.Close() })
		defer guard.Stop()
		for range 5 {
			if _, err := body.ReadByte(); err != nil {
				t.Fatalf("the open flow broke: %v", err)
			}
		}
	}
}

func join(t *testing.T, s *stage.Stage) error {
	t.Helper()
	key := newKey(t).Public()
	token := wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key), stage.Claims(nil)))
	session, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: key, Token: token})
	if err != nil {
		return err
	}
	return s.Call(timeout(t, 20*time.Second), http.MethodDelete, wire.PathSessions+"/"+session.ID, session.Secret, nil, nil)
}

// While the issuer's endpoints are away, its keys are those that were fetched before.
func TestIssuerAway(t *testing.T) {
	s := setup(t, stage.Options{})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	more := drip(t, s)
	s.Issuer.SetAway(true)
	if err := join(t, s); err != nil {
		t.Errorf("a join while the issuer is away: %v", err)
	}
	more()
	result, err := newJob(t, s, stage.JobOptions{}).Culvert(timeout(t, time.Minute), "up", "--json", "--mode", "tun", "--name", "second",
		"--timeout", "3s")
	if err != nil {
		t.Fatal(err)
	}
	if result.Code == 0 || result.Problem() == nil || result.Problem().Next == "" {
		t.Errorf("a job that gets no token: %s", result)
	}
	s.Issuer.SetAway(false)
	if err := join(t, s); err != nil {
		t.Errorf("a join when the issuer is back: %v", err)
	}
	more()
}

// A coordinator that dies ends no running job, however long it is away, and takes joins when it is back.
func TestCoordinatorKilledAndRestarted(t *testing.T) {
	t.Parallel() // it mostly waits for a lease to run out
	s := setup(t, stage.Options{Coordinator: "lease: 30s"})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	more := drip(t, s)
	s.KillCoordinator()
	more()
	// Longer than a lease: only a renewal at the gateway, through the tunnel, can keep the session.
	gone := time.Now()
	for time.Since(gone) < 40*time.Second {
		more()
	}
	if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)); err != nil || got != stage.Greeting {
		t.Errorf("a new flow without a coordinator: %q, %v", got, err)
	}
	ctx := timeout(t, 30*time.Second)
	if err := s.StartCoordinator(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, 15*time.Second, "a join after the restart", func() error { return join(t, s) })
	more()
	waitUp(t, job)
	culvert(t, job, 0, "down")
}

// A gateway that comes back has a new key; jobs join it again by themselves.
func TestGatewayRestarted(t *testing.T) {
	s := setup(t, stage.Options{})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	service := "http://" + s.Target(stage.PortHTTP)
	if _, err := get(t, s, service); err != nil {
		t.Fatal(err)
	}
	s.KillGateway()
	if err := s.StartGateway(timeout(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	eventually(t, 10*time.Second, "the service through the new gateway", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		conn, err := s.Runner.Dial(ctx, "tcp", s.Target(stage.PortHTTP))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	t.Logf("usable again %v after the new gateway was there", time.Since(began).Round(10*time.Millisecond))
	if got, err := get(t, s, service); err != nil || got != stage.Greeting {
		t.Errorf("after the restart: %q, %v", got, err)
	}
}

// Asked to stop, both servers do so cleanly and soon.
func TestServersStopWhenAsked(t *testing.T) {
	s := setup(t, stage.Options{})
	for name, stop := range map[string]func(context.Context) (int, error){
		"gateway": s.StopGateway, "coordinator": s.StopCoordinator,
	} {
		if code, err := stop(timeout(t, 10*time.Second)); err != nil || code != 0 {
			t.Errorf("%s: exit %d, %v", name, code, err)
		}
	}
}

// SIGTERM to a foreground client takes the tunnel down and ends the session.
func TestForegroundEndsOnSIGTERM(t *testing.T) {
	s := setup(t, stage.Options{})
	before := snapshot(t, s.Runner)
	job := newJob(t, s, stage.JobOptions{})
	proc, err := job.Start(s.Binary("culvert"), "up", "--foreground", "--mode", "tun")
	if err != nil {
		t.Fatal(err)
	}
	waitUp(t, job)
	if err := proc.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code, err := proc.Wait(timeout(t, 10*time.Second)); err != nil || code != 0 {
		t.Errorf("exit %d, %v", code, err)
	}
	unchanged(t, s.Runner, before)
}

// A rule that is taken away ends the sessions that it gave, without a restart.
func TestChangedPolicyEndsSessions(t *testing.T) {
	s := setup(t, stage.Options{})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	if err := s.WriteConfig(strings.ReplaceAll(s.DefaultRules(), stage.Repository, "acme/another"), ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the end of the session", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		conn, err := s.Runner.Dial(ctx, "tcp", s.Target(stage.PortHTTP))
		if err != nil {
			return nil
		}
		conn.Close()
		return fmt.Errorf("the service is still reachable")
	})
}

func eventually(t *testing.T, within time.Duration, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
