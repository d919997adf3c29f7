//go:build linux

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/stage"
)

func snapshot(t testing.TB, h *lab.Host) []string {
	t.Helper()
	lines, err := h.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// unchanged waits until the host is as it was: sockets of a process that was killed vanish a moment after it.
func unchanged(t testing.TB, h *lab.Host, before []string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		diff := cmp.Diff(before, snapshot(t, h))
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("host %s is not as it was (-before +after):\n%s", h.Name(), diff)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// fetch downloads with curl and compares the checksum.
func fetch(t testing.TB, job *stage.Job, url string, via ...string) {
	t.Helper()
	curl := program(t, "curl")
	line := append(via, curl, "--silent", "--show-error", "--fail", "--max-time", "90", url)
	got := output(t, job, line[0], line[1:]...)
	sum := sha256.Sum256([]byte(got))
	if hex.EncodeToString(sum[:]) != downloadSum() {
		t.Fatalf("the download of %d bytes has another checksum", len(got))
	}
}

func TestTunMode(t *testing.T) {
	s := setup(t, stage.Options{})
	before := snapshot(t, s.Runner)
	service := "http://" + s.Target(stage.PortHTTP)
	if got, err := get(t, s, service); err == nil {
		t.Fatalf("the service answers without a tunnel: %q", got)
	}
	job := newJob(t, s, stage.JobOptions{})
	r := up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	if r.Mode != "tun" || r.Timings["total_ms"] <= 0 {
		t.Errorf("up reports %+v", r)
	}
	curl := program(t, "curl")
	if got := output(t, job, curl, "--silent", "--show-error", "--max-time", "5", service); got != stage.Greeting {
		t.Errorf("curl got %q", got)
	}
	fetch(t, job, service+"/download")
	echo(t, s)
	culvert(t, job, 0, "status", "--json")
	culvert(t, job, 0, "check", s.Target(stage.PortHTTP))
	culvert(t, job, 0, "down")
	if got, err := get(t, s, service); err == nil {
		t.Errorf("the service still answers after down: %q", got)
	}
	unchanged(t, s.Runner, before)
}

// echo sends datagrams through the tunnel and wants them back.
func echo(t *testing.T, s *stage.Stage) {
	t.Helper()
	conn, err := s.Runner.Dial(timeout(t, 20*time.Second), "udp", s.Target(stage.PortEcho))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, size := range []int{1, 100, 1300} {
		_ = conn.SetDeadline(time.Now().Add(40 * time.Second))
		sent := []byte(strings.Repeat("x", size))
		if _, err := conn.Write(sent); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2000)
		n, err := conn.Read(buf)
		if err != nil || string(buf[:n]) != string(sent) {
			t.Fatalf("echo of %d bytes: got %d, %v", size, n, err)
		}
	}
}

func TestProxyModeAsAnOrdinaryUser(t *testing.T) {
	s := setup(t, stage.Options{})
	before := snapshot(t, s.Runner)
	job := newJob(t, s, stage.JobOptions{Unprivileged: true})
	r := up(t, job, "proxy", "--wait-for", s.Target(stage.PortHTTP))
	if r.Proxy == "" {
		t.Fatalf("up reports no proxy: %+v", r)
	}
	curl, service := program(t, "curl"), "http://"+s.Target(stage.PortHTTP)
	exec := []string{s.Binary("culvert"), "exec", "--"}
	line := append(exec, curl, "--silent", "--show-error", "--max-time", "5", service)
	if got := output(t, job, line[0], line[1:]...); got != stage.Greeting {
		t.Errorf("curl got %q", got)
	}
	for _, scheme := range []string{"socks5", "http"} {
		got := output(t, job, curl, "--silent", "--show-error", "--max-time", "5", "--proxy", scheme+"://"+r.Proxy, service)
		if got != stage.Greeting {
			t.Errorf("curl through %s got %q", scheme, got)
		}
	}
	fetch(t, job, service+"/download", exec...)
	culvert(t, job, 0, "down")
	unchanged(t, s.Runner, before)
}

func TestAnotherRepositoryIsDenied(t *testing.T) {
	s := setup(t, stage.Options{})
	job := newJob(t, s, stage.JobOptions{Claims: map[string]any{"repository": "acme/other", "repository_id": "4712"}})
	for _, flags := range [][]string{{"up", "--json"}, {"up", "--json", "--foreground"}} {
		result := culvert(t, job, problem.ExitDenied, append(flags, "--mode", "tun")...)
		p := result.Problem()
		if p == nil || p.Code != problem.Denied || p.Denial == nil {
			t.Fatalf("culvert %v: no denial in %s", flags, result)
		}
		want := problem.Denial{Rule: "deploy", Claim: "repository", Expected: []string{stage.Repository}, Got: "acme/other"}
		if diff := cmp.Diff(want, *p.Denial); diff != "" {
			t.Errorf("denial (-want +got):\n%s", diff)
		}
	}
	stranger := newJob(t, s, stage.JobOptions{Claims: map[string]any{
		"repository": "evil/shop", "repository_owner": "evil", "repository_owner_id": "666"}})
	result := culvert(t, stranger, problem.ExitDenied, "up", "--json", "--mode", "tun")
	if p := result.Problem(); p == nil || p.Denial != nil || strings.Contains(p.Error(), "deploy") {
		t.Errorf("a stranger learns something: %s", result)
	}
}

// A grant of everything, for a fixed address on the internet, takes neither the tunnel's own packets nor the runner's own traffic to its
// coordinator along.
func TestFixedEgress(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(*stage.Stage) string {
		return fmt.Sprintf("- name: egress\n  network: corp\n  match: {repository_owner_id: %q}\n  allow: [\"tcp 0.0.0.0/0:1-65535\"]\n", stage.OwnerID)
	}})
	web, err := s.Net.Host("web", lab.HostOptions{})
	must(t, err)
	must(t, s.Serve(web, 80, nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprint(w, from)
	})))
	seen := func(want string) {
		t.Helper()
		if got, err := get(t, s, "http://"+web.Addr().String()+"/"); err != nil || got != want {
			t.Errorf("a server on the internet sees %q, %v; want %s", got, err, want)
		}
	}
	before := snapshot(t, s.Runner)
	seen(s.NATs[0].Public().String())
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--wait-for", web.Addr().String()+":80")
	seen(s.NATs[1].Public().String())
	var direct struct {
		Path struct{ Kind string }
	}
	decode(t, culvert(t, job, 0, "status", "--json").Stdout, &direct)
	if direct.Path.Kind != "reflexive" {
		t.Errorf("the tunnel's path is %q", direct.Path.Kind)
	}
	culvert(t, job, 0, "down")
	seen(s.NATs[0].Public().String())
	unchanged(t, s.Runner, before)
}

// What a job keeps outside, by address, CIDR or name, takes no part in a grant of everything, in any mode; all else does.
func TestFixedEgressWithExceptions(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(*stage.Stage) string {
		return fmt.Sprintf("- {name: egress, network: corp, match: {repository_owner_id: %q}, allow: [\"tcp 0.0.0.0/0:1-65535\"]}\n", stage.OwnerID)
	}})
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprint(w, from)
	})
	site := map[string]*lab.Host{}
	for _, name := range []string{"web", "mirror", "subnet", "forge"} {
		host, err := s.Net.Host(name, lab.HostOptions{})
		must(t, err)
		must(t, s.Serve(host, 80, nil, echo))
		site[name] = host
	}
	before := snapshot(t, s.Runner)
	hosts := filepath.Join(newJob(t, s, stage.JobOptions{}).Home(), "hosts")
	must(t, os.WriteFile(hosts, fmt.Appendf(nil, "127.0.0.1 localhost\n%s forge.example.com\n", site["forge"].Addr()), 0o644))
	inside, outside := s.NATs[1].Public().String(), s.NATs[0].Public().String()
	for _, mode := range []string{"tun", "proxy"} {
		job := newJob(t, s, stage.JobOptions{})
		join := "mount --bind " + hosts + " /etc/hosts && exec " + s.Binary("culvert") + " up --mode " + mode +
			" --direct " + site["mirror"].Addr().String() + " --direct " + netip.PrefixFrom(site["subnet"].Addr(), 30).Masked().String() + " --direct forge.example.com"
		output(t, job, program(t, "unshare"), "--mount", "sh", "-c", join)
		for name, host := range site {
			fetch := []string{program(t, "curl"), "--silent", "--show-error", "--max-time", "20", "http://" + host.Addr().String()}
			if mode == "proxy" {
				fetch = append([]string{s.Binary("culvert"), "exec", "--"}, fetch...)
			}
			want := outside
			if name == "web" {
				want = inside
			}
			if got := output(t, job, fetch[0], fetch[1:]...); got != want {
				t.Errorf("mode %s: %s sees %q, want %s", mode, name, got, want)
			}
		}
		culvert(t, job, 0, "down")
	}
	unchanged(t, s.Runner, before)
}

// kill -9 of the process that holds the tunnel leaves the host as it was.
func TestKillLeavesTheHostClean(t *testing.T) {
	for _, mode := range []string{"tun", "proxy"} {
		t.Run(mode, func(t *testing.T) {
			s := setup(t, stage.Options{})
			before := snapshot(t, s.Runner)
			job := newJob(t, s, stage.JobOptions{Unprivileged: mode == "proxy"})
			proc, err := job.Start(s.Binary("culvert"), "up", "--foreground", "--mode", mode)
			if err != nil {
				t.Fatal(err)
			}
			waitUp(t, job)
			if mode == "tun" {
				if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)); err != nil || got != stage.Greeting {
					t.Fatalf("through the tunnel: %q, %v", got, err)
				}
				if cmp.Equal(before, snapshot(t, s.Runner)) {
					t.Fatal("the snapshot does not see the tunnel")
				}
			}
			if err := proc.Signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-proc.Done()
			unchanged(t, s.Runner, before)
		})
	}
}

// waitUp waits until the job's tunnel says that it is usable.
func waitUp(t testing.TB, job *stage.Job) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		result, err := job.Culvert(timeout(t, 20*time.Second), "status", "--json")
		if err == nil && result.Code == 0 && strings.Contains(strings.ReplaceAll(result.Stdout, " ", ""), `"state":"up"`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the tunnel does not come up: %s, %v", result, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A policy is found rather than guessed: what an observe line lets through is on record, and of the record comes the smallest list that
// covers what the job did. What is denied all the same is named beside it, and is no part of it.
func TestPolicyIsFound(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(s *stage.Stage) string {
		return fmt.Sprintf("- {name: look, network: %s, match: {repository_owner_id: %q}, allow: [\"tcp %s\"], observe: [%v/32]}\n",
			stage.Network, stage.OwnerID, s.Target(stage.PortHTTP), s.Private.Addr())
	}})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	for _, port := range []uint16{stage.PortHTTP, stage.PortOther} {
		if _, err := get(t, s, "http://"+s.Target(port)); err != nil {
			t.Errorf("port %d: %v", port, err)
		}
	}
	const metadata = "169.254.169.254:80"
	culvert(t, job, problem.FlowDenied.Exit(), "check", metadata)
	culvert(t, job, 0, "down")
	want := fmt.Sprintf("allow:\n  - \"tcp %v:%d-%d\" # of it not allowed yet: tcp %s\n# denied, and not in the list: tcp %s",
		s.Private.Addr(), stage.PortHTTP, stage.PortOther, s.Target(stage.PortOther), metadata)
	eventually(t, 30*time.Second, "a list of what the job did", func() error {
		var out, errs bytes.Buffer
		code, err := s.Cloud.Run(timeout(t, time.Minute), lab.Program{
			Path: s.Binary("culvert-coordinator"), Args: []string{"suggest", "--from", "audit", "--config", s.ConfigFile()}, Env: os.Environ(), Stdout: &out, Stderr: &errs,
		})
		if err != nil || code != 0 || !strings.Contains(out.String(), want) {
			return fmt.Errorf("exit %d, %w: %s%s", code, err, out.String(), errs.String())
		}
		return nil
	})
}

// A destination outside the grant is reset at once; a granted one that nobody listens on refuses as it does without a tunnel.
func TestOutsideTheGrantIsReset(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(s *stage.Stage) string {
		return fmt.Sprintf(`- name: deploy
  network: corp
  match: {repository_owner_id: %q}
  allow: ["tcp %s:80", "tcp %s:9999"]
`, stage.OwnerID, s.Private.Addr(), s.Private.Addr())
	}})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	for _, port := range []uint16{stage.PortOther, 9999} {
		refused(t, s.Runner, s.Target(port))
	}
	culvert(t, job, problem.FlowDenied.Exit(), "check", s.Target(stage.PortOther))
	culvert(t, job, problem.FlowUnreachable.Exit(), "check", s.Target(9999))
	culvert(t, job, problem.ExitDone, "down")
	// A forward to what is not granted is refused at once, also where the runner itself could connect.
	for _, target := range []string{s.Target(stage.PortOther), net.JoinHostPort("localhost", "7")} {
		got := culvert(t, job, problem.ExitDenied, "up", "--json", "--mode", "tun", "--forward", "18083:"+target)
		if p := got.Problem(); p == nil || p.Code != problem.FlowDenied || !strings.Contains(p.Message, "leads nowhere: the grant does not cover "+target) {
			t.Errorf("a forward to %s: %s", target, got)
		}
	}
}
