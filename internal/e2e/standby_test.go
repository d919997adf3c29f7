//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// standing is what `culvert status --json` says, as far as these tests look at it.
type standing struct {
	State   string `json:"state"`
	Gateway string `json:"gateway"`
	Standby string `json:"standby"`
	Rejoins int    `json:"rejoins"`
	PID     int    `json:"pid"`
}

func statusOf(t testing.TB, job *stage.Job) (st standing) {
	t.Helper()
	decode(t, culvert(t, job, 0, "status", "--json").Stdout, &st)
	return st
}

// pairUp is a stage with two gateways and a job that is up with a standby.
func pairUp(t *testing.T, opts stage.Options) (*stage.Stage, *stage.Job, standing) {
	t.Helper()
	s := setup(t, opts)
	if err := s.LaunchSecondGateway(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the second gateway", func() error {
		_, log, _ := strings.Cut(s.Logs(), "--- second.log")
		if !strings.Contains(log, "stream to the coordinator is up") {
			return errors.New("it has not been welcomed yet")
		}
		return nil
	})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	var st standing
	eventually(t, 30*time.Second, "a standby", func() error {
		if st = statusOf(t, job); st.Standby == "" {
			return errors.New("there is none")
		}
		return nil
	})
	return s, job, st
}

// keep joins as a client that never comes, and leaves the session to its lease.
func keep(t testing.TB, s *stage.Stage) wire.Session {
	t.Helper()
	key := newKey(t).Public()
	token := wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key), stage.Claims(nil)))
	session, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: key, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return session
}

// carriers gives the gateway that carries a job and the other one.
func carriers(s *stage.Stage, st standing) (carries, other *lab.Process) {
	if st.Gateway == "second" {
		return s.SecondGateway(), s.Gateway()
	}
	return s.Gateway(), s.SecondGateway()
}

// sockets counts a process's open sockets.
func sockets(t testing.TB, pid int) (n int) {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range list {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// A gateway dies under load: a flow that begins at that moment gets through the other one within seconds, the session is the
// same, what was open is reset and does not hang, and nothing of it is left. A name under a wildcard leads on to where it led, though
// the job does not look it up again.
func TestGatewayKilledUnderLoad(t *testing.T) {
	const name = "api.svc.corp"
	s, job, before := pairUp(t, stage.Options{Names: []string{name}, Rules: func(s *stage.Stage) string {
		return s.DefaultRules() + fmt.Sprintf("- {name: names, network: %s, match: {repository_owner_id: %q}, allow: [\"tcp *.svc.corp:%d\"]}\n",
			stage.Network, stage.OwnerID, stage.PortHTTP)
	}})
	dying, other := carriers(s, before)
	service := "http://" + s.Target(stage.PortHTTP)
	remembered := serviceAddress(t, s, name)
	if got, err := get(t, s, "http://"+remembered.String()); err != nil || got != stage.Greeting {
		t.Fatalf("by name: %q, %v", got, err)
	}
	if _, err := get(t, s, service); err != nil {
		t.Fatal(err)
	}
	calm := goroutines(t, s, before.Gateway != "second")
	atRest := map[int]int{other.Pid(): sockets(t, other.Pid()), before.PID: sockets(t, before.PID)}

	quiet := many(t, s, 40) // they would hang for ever if nobody said a word
	broken := make(chan error, 1)
	flowing := make(chan struct{})
	go func() {
		resp, err := s.Client(s.Runner, 5*time.Minute).Get(service + "/drip")
		close(flowing)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		broken <- err
	}()
	loading, unload := context.WithCancel(t.Context())
	loaded := make(chan struct{})
	go func() {
		defer close(loaded)
		load(loading, s, service+"/download")
	}()
	defer func() { unload(); <-loaded }()
	<-flowing

	dying.Kill()
	began := time.Now()
	conn, err := s.Runner.Dial(timeout(t, 30*time.Second), "tcp", s.Target(stage.PortHTTP))
	if err != nil {
		t.Fatalf("a new flow: %v", err)
	}
	conn.Close()
	took := time.Since(began)
	t.Logf("a flow that began when the gateway died was there after %v", took.Round(time.Millisecond))
	if took > 10*time.Second { // 3 s: TCP's second retry; on a machine that is too busy for that, the third, after 7 s
		t.Errorf("a new flow took %v", took)
	}
	if got, err := get(t, s, "http://"+remembered.String()); err != nil || got != stage.Greeting {
		t.Errorf("by the name's address at the gateway that has died: %q, %v", got, err)
	}
	if got, err := get(t, s, service); err != nil || got != stage.Greeting {
		t.Errorf("the service: %q, %v", got, err)
	}
	select {
	case err := <-broken:
		if err == nil {
			t.Error("the open answer came to a good end")
		}
	case <-time.After(30 * time.Second):
		t.Error("the open flow hangs")
	}
	for _, c := range quiet {
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a flow on which nothing happened: %v", err)
		}
	}
	open := many(t, s, 40) // through the other gateway now
	unload()
	<-loaded
	for _, c := range open {
		c.Close()
	}
	after := statusOf(t, job)
	if after.State != "up" || after.Rejoins != 0 || after.Gateway != before.Standby {
		t.Errorf("before %+v, after %+v", before, after)
	}
	eventually(t, 30*time.Second, "nothing left of what was open", func() error {
		for pid, rest := range atRest {
			if now := sockets(t, pid); now > rest+8 { // idle connections to the coordinator, which come and go
				return fmt.Errorf("process %d has %d sockets, and had %d", pid, now, rest)
			}
		}
		if now := goroutines(t, s, before.Gateway != "second"); calm > 0 && now > calm+20 { // of 40 flows each has two at least; and it carries the session now
			return fmt.Errorf("the gateway has %d goroutines, and had %d", now, calm)
		}
		return nil
	})
}

// goroutines counts those of one of two gateways; 0 where it cannot be asked.
func goroutines(t *testing.T, s *stage.Stage, second bool) int {
	t.Helper()
	if os.Getenv(gatewayEnv) == "image" {
		return 0
	}
	n, err := s.GatewayMetric(second, "go_goroutines")
	must(t, err)
	return int(n)
}

// serviceAddress asks the gateway for a name, as a runner's resolver would.
func serviceAddress(t *testing.T, s *stage.Stage, name string) netip.Addr {
	t.Helper()
	conn, err := s.Runner.Dial(timeout(t, 20*time.Second), "udp", "198.18.0.1:53")
	must(t, err)
	defer conn.Close()
	var got netip.Addr
	eventually(t, 30*time.Second, "the name's address", func() error {
		answer, _, err := new(dns.Client).ExchangeWithConn(new(dns.Msg).SetQuestion(name+".", dns.TypeA), &dns.Conn{Conn: conn})
		if err != nil || len(answer.Answer) == 0 {
			return fmt.Errorf("the answer is %v, %w", answer, err)
		}
		got, _ = netip.AddrFromSlice(answer.Answer[0].(*dns.A).A.To4())
		return nil
	})
	return got
}

// many opens connections to the service, on which nothing is said.
func many(t testing.TB, s *stage.Stage, n int) (list []net.Conn) {
	t.Helper()
	for range n {
		c, err := s.Runner.Dial(timeout(t, 20*time.Second), "tcp", s.Target(stage.PortHTTP))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		list = append(list, c)
	}
	return list
}

// load downloads again and again until ctx ends.
func load(ctx context.Context, s *stage.Stage, url string) {
	client := s.Client(s.Runner, time.Minute)
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return
		}
		resp, err := client.Do(req)
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// Jobs are spread over the gateways. One that is asked to stop takes no more; the job on it moves to the other when it has no
// connection open, and not one of its flows fails; then the gateway ends cleanly.
func TestGatewaysSpreadAndDrain(t *testing.T) {
	s, job, before := pairUp(t, stage.Options{Drain: time.Minute})
	const jobs = 20
	share := map[string]int{}
	for range jobs {
		share[keep(t, s).Gateways[0].Name]++
	}
	t.Logf("%d jobs are spread as %v", jobs, share)
	if len(share) != 2 || share["second"] < 6 || share["second"] > jobs-6 {
		t.Errorf("%d jobs are spread as %v", jobs, share)
	}

	stopping, _ := carriers(s, before)
	service := "http://" + s.Target(stage.PortHTTP)
	open, err := s.Client(s.Runner, 5*time.Minute).Get(service + "/drip")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Body.Close()
	flows := make(chan error, 1)
	stop := make(chan struct{})
	count := 0
	go func() {
		client := s.Client(s.Runner, 30*time.Second)
		for {
			select {
			case <-stop:
				flows <- nil
				return
			default:
			}
			resp, err := client.Get(service)
			if err != nil {
				flows <- fmt.Errorf("flow %d: %w", count, err)
				return
			}
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err != nil {
				flows <- fmt.Errorf("flow %d: %w", count, err)
				return
			}
			count++
			time.Sleep(20 * time.Millisecond)
		}
	}()
	if err := stopping.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, 40*time.Second, "no new session on the gateway that stops", func() error {
		for range 4 {
			if keep(t, s).Gateways[0].Name == before.Gateway {
				return errors.New("it still gets some")
			}
		}
		return nil
	})
	if _, err := io.ReadFull(open.Body, make([]byte, 20)); err != nil { // two seconds' worth
		t.Errorf("the open flow: %v", err)
	}
	if now := statusOf(t, job); now.Gateway != before.Gateway {
		t.Errorf("moved to %s while a connection was open", now.Gateway)
	}
	open.Body.Close()
	code, err := stopping.Wait(timeout(t, 50*time.Second))
	if err != nil || code != 0 {
		t.Errorf("exit %d, %v", code, err)
	}
	if got, err := get(t, s, service); err != nil || got != stage.Greeting {
		t.Errorf("the service: %q, %v", got, err)
	}
	close(stop)
	if err := <-flows; err != nil {
		t.Error(err)
	}
	after := statusOf(t, job)
	if after.State != "up" || after.Rejoins != 0 || after.Gateway != before.Standby || count == 0 {
		t.Errorf("before %+v, after %+v, %d flows", before, after, count)
	}
}
