//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/podman"
	"github.com/culvertnet/culvert/internal/stage"
)

// ownNames is the DNS server that a runner's network has.
type ownNames struct {
	mu    sync.Mutex
	asked []string
}

const (
	publicName = "github.com"
	publicAddr = "192.0.2.80"
)

func (o *ownNames) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	name := strings.TrimSuffix(strings.ToLower(q.Question[0].Name), ".")
	o.mu.Lock()
	o.asked = append(o.asked, name)
	o.mu.Unlock()
	m := new(dns.Msg).SetReply(q)
	switch {
	case name != publicName:
		m.Rcode = dns.RcodeNameError
	case q.Question[0].Qtype == dns.TypeA:
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: netip.MustParseAddr(publicAddr).AsSlice(),
		}}
	}
	_ = w.WriteMsg(m)
}

func (o *ownNames) saw(name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Contains(o.asked, name)
}

// containers is a runner with podman, and a DNS server of its own.
type containers struct {
	*stage.Stage
	engine *podman.Engine
	names  *ownNames
	job    *stage.Job
	mounts string // pid of a process that has the runner's mounts
}

// nsenter is part of util-linux, like unshare.
const nsenter = "/usr/bin/nsenter"

const containerImage = "localhost/busybox:1"

// fetchByName gets a page by name. A busybox that is linked statically looks names up with nslookup alone, which says the address last.
const fetchByName = `printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 20 "$(nslookup -type=a "$1" | sed -n 's/^Address: *//p' | tail -n 1)" 80`

func newContainers(t *testing.T, rules func(*stage.Stage) string) *containers {
	t.Helper()
	if err := podman.Missing(); err != nil {
		lab.Skip(t, "no containers: %v", err)
	}
	program(t, "/usr/lib/podman/netavark")
	program(t, "/usr/lib/podman/aardvark-dns")
	dir, err := scratch("culvert-podman-")
	must(t, err)
	c := &containers{names: &ownNames{}}
	c.engine, err = podman.New(timeout(t, time.Minute), dir)
	must(t, err)
	t.Cleanup(func() { must(t, c.engine.Close()) })
	must(t, c.engine.Busybox(timeout(t, time.Minute), containerImage))
	c.Stage = setup(t, stage.Options{Names: []string{"db.internal"}, Rules: rules})
	c.job = newJob(t, c.Stage, stage.JobOptions{})
	c.mounts = c.names.serve(t, c.Stage, c.job, "true")
	return c
}

// serve makes these the names that the runner's network has: a server on the internet, and a resolv.conf in a mount namespace of the
// runner's, in which a command is run first. It gives the pid of a process there.
func (o *ownNames) serve(t *testing.T, s *stage.Stage, job *stage.Job, first string) (pid string) {
	t.Helper()
	resolver, err := s.Net.Host("resolver", lab.HostOptions{})
	must(t, err)
	conn, err := resolver.ListenPacket(netip.AddrPortFrom(resolver.Addr(), 53).String())
	must(t, err)
	server := &dns.Server{PacketConn: conn, Handler: o}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.ActivateAndServe() })
	t.Cleanup(func() { conn.Close(); serving.Wait() })
	file := filepath.Join(job.Home(), "resolv.conf")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "nameserver %s\n", resolver.Addr()), 0o644))
	holder, err := s.Runner.Start(lab.Program{Path: program(t, "unshare"), Args: []string{"--mount", "sh", "-c",
		`mount --bind "$1" /etc/resolv.conf && ` + first + ` && touch "$1.there" && exec sleep 600`, "sh", file}})
	must(t, err)
	eventually(t, time.Minute, "a mount", func() error { _, err := os.Stat(file + ".there"); return err })
	return strconv.Itoa(holder.Pid())
}

// in gives what runs a program with the runner's mounts.
func (c *containers) in(p lab.Program) lab.Program {
	p.Path, p.Args = nsenter, append([]string{"--mount", "--target", c.mounts, "--", p.Path}, p.Args...)
	return p
}

// podman runs podman on the runner, which must succeed unless fails, and gives what it printed.
func (c *containers) podman(t *testing.T, fails bool, args ...string) string {
	t.Helper()
	p := c.in(c.engine.Command(args...))
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	must(t, err)
	defer out.Close()
	p.Stdout, p.Stderr = out, out
	code, err := c.Runner.Run(timeout(t, time.Minute), p)
	must(t, err)
	said, err := os.ReadFile(out.Name())
	must(t, err)
	if (code != 0) != fails {
		t.Fatalf("podman %v: exit %d\n%s", args, code, said)
	}
	return string(said)
}

// Containers that a job starts reach a granted name on podman's own network and on one that the job has made, where they also keep each
// other's names; what is not granted is resolved where it was before, and granted names are asked for nowhere else.
func TestContainersOfAJob(t *testing.T) {
	c := newContainers(t, func(*stage.Stage) string {
		return fmt.Sprintf("- {name: names, network: corp, match: {repository_owner_id: %q}, allow: [\"tcp db.internal:%d\"]}\n", stage.OwnerID, stage.PortHTTP)
	})
	run := func(network string, args ...string) []string {
		return append([]string{"run", "--rm", "--pull=never", "--ulimit", "host", "--timeout", "300", "--network", network, containerImage}, args...)
	}
	c.podman(t, false, "network", "create", "work")
	peer, err := c.Runner.Start(c.in(c.engine.Command(append([]string{"run", "--rm", "--name", "peer", "--timeout", "300", "--pull=never", "--ulimit", "host", "--network", "work", containerImage}, "sleep", "300")...)))
	must(t, err)
	t.Cleanup(func() {
		c.podman(t, false, "rm", "--force", "--time", "0", "peer")
		_, _ = peer.Wait(timeout(t, 30*time.Second))
	})
	eventually(t, time.Minute, "a container", func() error {
		if !strings.Contains(c.podman(t, false, "ps", "--format", "{{.Names}}"), "peer") {
			return fmt.Errorf("it is not there")
		}
		return nil
	})
	for _, network := range []string{"podman", "work"} {
		c.podman(t, true, run(network, "nslookup", "db.internal")...)
	}
	c.podman(t, false, run("work", "nslookup", "-type=a", "peer")...)
	c.names.mu.Lock()
	c.names.asked = nil
	c.names.mu.Unlock()
	output(t, c.job, nsenter, "--mount", "--target", c.mounts, "--", c.Binary("culvert"), "up", "--mode", "tun", "--wait-for", "db.internal:80")
	for _, network := range []string{"podman", "work"} {
		if got := c.podman(t, false, run(network, "sh", "-c", fetchByName, "sh", "db.internal")...); !strings.Contains(got, stage.Greeting) {
			t.Errorf("network %s: the service answers %q", network, got)
		}
		if got := c.podman(t, false, run(network, "nslookup", publicName)...); !strings.Contains(got, publicAddr) {
			t.Errorf("network %s: %s resolves to %s", network, publicName, got)
		}
	}
	c.podman(t, false, run("work", "nslookup", "-type=a", "peer")...)
	if c.names.saw("db.internal") || !c.names.saw(publicName) {
		t.Errorf("the runner's own DNS server was asked for %q", c.names.asked)
	}
	culvert(t, c.job, 0, "down")
	for _, network := range []string{"podman", "work"} {
		c.podman(t, true, run(network, "nslookup", "db.internal")...)
	}
}
