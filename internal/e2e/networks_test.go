//go:build linux

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/stage"
)

// otherNetwork is the name of a second network, and what its rule grants: a name whose service address is of the same range as those of the
// first one's names, and the service's other port.
const (
	otherNetwork = "lab"
	otherName    = "wiki.lab"
	firstName    = "db.internal"
)

// inTwo is a stage with two networks. Each grants a name, another port of the service, and a range of its own.
func inTwo(t testing.TB, opts stage.Options, more ...string) *stage.Stage {
	t.Helper()
	opts.Other, opts.Names = otherNetwork, []string{firstName, otherName}
	opts.Rules = func(*stage.Stage) string {
		rule := "- {name: %s, network: %s, match: {repository_owner_id: %q}, allow: [%q, %q%s]}\n"
		extra := ""
		for _, line := range more {
			extra += fmt.Sprintf(", %q", line)
		}
		return fmt.Sprintf(rule, "first", stage.Network, stage.OwnerID, fmt.Sprintf("tcp %s:%d", firstName, stage.PortHTTP), "tcp 10.81.0.0/24:1", extra) +
			fmt.Sprintf(rule, "other", otherNetwork, stage.OwnerID, fmt.Sprintf("tcp %s:%d", otherName, stage.PortOther), "tcp 10.82.0.0/24:1", extra)
	}
	return setup(t, opts)
}

// named gives the targets of both networks.
func named() [2]string {
	return [2]string{fmt.Sprintf("%s:%d", firstName, stage.PortHTTP), fmt.Sprintf("%s:%d", otherName, stage.PortOther)}
}

// A job joins two networks, one after the other. Both are usable at once, in both modes: each name leads to its own network, though both
// networks' names have addresses of one range and both gateways the same; status, check, exec and down are about both.
func TestTwoNetworks(t *testing.T) {
	s := inTwo(t, stage.Options{})
	before := snapshot(t, s.Runner)
	curl := []string{program(t, "curl"), "--silent", "--show-error", "--max-time", "20"}
	for _, mode := range []string{"tun", "proxy"} {
		t.Run(mode, func(t *testing.T) {
			job := newJob(t, s, stage.JobOptions{Unprivileged: mode == "proxy"})
			for i, network := range []string{stage.Network, otherNetwork} {
				culvert(t, job, 0, "up", "--mode", mode, "--network", network, "--name", network, "--wait-for", named()[i])
			}
			both := stage.Network + "," + otherNetwork
			for _, names := range []string{both, otherNetwork + "," + stage.Network, ""} {
				job.Setenv("CULVERT_NAME", names)
				for _, target := range named() {
					line := append([]string{s.Binary("culvert"), "exec", "--"}, append(curl, "http://"+target+"/")...)
					if got := output(t, job, line[0], line[1:]...); got != stage.Greeting {
						t.Errorf("%s answers %q", target, got)
					}
				}
				culvert(t, job, 0, append([]string{"check"}, named()[0], named()[1])...)
				culvert(t, job, 3, "check", firstName+":81") // its own network grants another port, and no other network has the name
				for _, network := range []string{stage.Network, otherNetwork} {
					if got := culvert(t, job, 3, "check", "10.84.0.1:80").Stdout; !strings.Contains(got, "denied by tunnel "+network+": not granted") {
						t.Errorf("what neither grants, with the names %q: %s", names, got)
					}
				}
			}
			if got := culvert(t, job, 1, "down"); !strings.Contains(got.Stderr, "--name "+stage.Network) {
				t.Errorf("down without a name: %s", got)
			}
			status := culvert(t, job, 0, "status").Stdout
			for _, want := range []string{stage.Network + ":\n", otherNetwork + ":\n", firstName, otherName, "10.81.0.0/24", "10.82.0.0/24"} {
				if !strings.Contains(status, want) {
					t.Errorf("status does not say %q:\n%s", want, status)
				}
			}
			if got := strings.Count(culvert(t, job, 0, "status", "--json").Stdout, "\n"); got != 2 {
				t.Errorf("status --json prints %d lines", got)
			}
			culvert(t, job, 0, "down", "--name", stage.Network)
			job.Setenv("CULVERT_NAME", otherNetwork)
			line := append([]string{s.Binary("culvert"), "exec", "--"}, append(curl, "http://"+named()[1]+"/")...)
			if got := output(t, job, line[0], line[1:]...); got != stage.Greeting {
				t.Errorf("after the end of the first network %s answers %q", otherName, got)
			}
			culvert(t, job, 0, "down")
			unchanged(t, s.Runner, before)
		})
	}
}

// What two networks of a job both grant cannot be told apart by programs with an interface, and the second is refused with word of what
// it is; the first stays. In mode proxy programs choose a proxy.
func TestNetworksThatOverlap(t *testing.T) {
	s := inTwo(t, stage.Options{}, "tcp 10.83.0.0/24:1", "tcp git.internal:1")
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--network", stage.Network)
	refused := culvert(t, job, 1, "up", "--json", "--mode", "tun", "--network", otherNetwork, "--name", otherNetwork)
	p := refused.Problem()
	if p == nil || p.Code != "overlap" || !strings.Contains(p.Message, "10.83.0.0/24") || !strings.Contains(p.Message, "git.internal") || strings.Contains(p.Message, "10.82") {
		t.Errorf("the second network: %s", refused)
	}
	culvert(t, job, 0, "check", named()[0])
	culvert(t, job, 0, "up", "--mode", "proxy", "--network", otherNetwork, "--name", otherNetwork)
	culvert(t, job, 0, "down", "--name", otherNetwork)
}

// A granted range holds the runner's own subnet and that of a bridge, as Docker makes them. Both stay reachable before, during and after,
// and up says what stays with which.
func TestLocalLinksWin(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(s *stage.Stage) string {
		return fmt.Sprintf("- {name: wide, network: %s, match: {repository_owner_id: %q}, allow: [\"tcp %s\", \"tcp 172.16.0.0/12:80\", \"tcp %s:9\"]}\n",
			stage.Network, stage.OwnerID, s.Target(stage.PortHTTP), s.NATs[0].LAN())
	}})
	ip := program(t, "ip")
	job := newJob(t, s, stage.JobOptions{})
	for _, args := range [][]string{{"link", "add", "docker0", "type", "bridge"},
		{"link", "set", "docker0", "addrgenmode", "none"}, // no link-local address: the kernel would finish making it whenever it likes
		{"addr", "add", "172.17.0.1/16", "dev", "docker0"}, {"link", "set", "docker0", "up"}} {
		output(t, job, ip, args...)
	}
	local := func(when string) {
		t.Helper()
		for to, want := range map[string]string{"172.17.0.9": "dev docker0", s.Runner.Addr().Next().String(): "dev eth0"} {
			if got := output(t, job, ip, "route", "get", to); !strings.Contains(got, want) {
				t.Errorf("%s: %s is reached by %s", when, to, got)
			}
		}
		if conn, err := s.Runner.Dial(timeout(t, time.Minute), "tcp", s.IssuerHost.Addr().String()+":443"); err != nil {
			t.Errorf("%s: the internet: %v", when, err)
		} else {
			conn.Close()
		}
	}
	before := snapshot(t, s.Runner)
	local("before")
	said := culvert(t, job, 0, "up", "--mode", "tun").Stdout
	for _, want := range []string{"172.17.0.0/16 to docker0: granted, but directly connected", " to eth0: granted, but directly connected"} {
		if !strings.Contains(said, want) {
			t.Errorf("up does not say %q:\n%s", want, said)
		}
	}
	if status := culvert(t, job, 0, "status").Stdout; !strings.Contains(status, "172.17.0.0/16 to docker0") {
		t.Errorf("nor does status:\n%s", status)
	}
	local("during")
	if got := output(t, job, ip, "route", "get", "172.20.0.1"); !strings.Contains(got, "dev culvert0") {
		t.Errorf("the rest of the range goes elsewhere: %s", got)
	}
	culvert(t, job, 0, "down")
	local("after")
	unchanged(t, s.Runner, before)
}
