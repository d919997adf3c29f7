//go:build linux

package scale

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/culvertnet/culvert/internal/lab"
)

// cluster is three nats-servers and three coordinators on it, each in a network namespace of its own.
type cluster struct {
	t     testing.TB
	net   *lab.Net
	dir   string
	hosts []*lab.Host // of the nats-servers
	nats  []*process
	nodes []*node
	jobs  *lab.Host     // where jobs and gateways are played
	voter nkeys.KeyPair // of the user that may ask for elections
	url   string
}

const (
	natsPort  = 4222
	routePort = 6222
	pagePort  = 8222
)

func newCluster(t testing.TB) *cluster {
	t.Helper()
	lab.Require(t)
	c := &cluster{t: t, dir: t.TempDir(), url: "https://culvert.test"}
	var err error
	if c.voter, err = nkeys.CreateUser(); err != nil {
		t.Fatal(err)
	}
	if c.net, err = lab.New(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.net.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range 3 {
		c.hosts = append(c.hosts, c.host(fmt.Sprint("nats", i)))
	}
	c.jobs = c.host("jobs")
	for i := range c.hosts {
		c.nats = append(c.nats, nil)
		c.startNATS(i)
	}
	for i := range c.hosts {
		c.awaitNATS(i)
	}
	issuer := "http://" + freeAddr(t, c.jobs)
	voter := c.seed()
	urls := c.each(natsPort, "nats://", ", ")
	for i := range 3 {
		h := c.host(fmt.Sprint("coordinator", i))
		page := freeAddr(t, h)
		n := newNode(t, h, issuer, c.url, fmt.Sprintf("state: {nats: [%s], elections: %s}\naudit: {max_size: 256MiB, log: off}\nprivate: {listen: %q}\n", urls, voter, page))
		n.page = page
		c.nodes = append(c.nodes, n)
	}
	for _, n := range c.nodes { // one after the other: the first makes the streams
		n.serve()
		n.ready()
	}
	return c
}

func (c *cluster) host(name string) *lab.Host {
	c.t.Helper()
	h, err := c.net.Host(name, lab.HostOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return h
}

// each lists the nats-servers' addresses at a port.
func (c *cluster) each(port uint16, before, between string) string {
	var list []string
	for _, h := range c.hosts {
		list = append(list, before+netip.AddrPortFrom(h.Addr(), port).String())
	}
	return strings.Join(list, between)
}

// seed writes the seed of the user that may ask for elections to a file.
func (c *cluster) seed() string {
	c.t.Helper()
	seed, err := c.voter.Seed()
	file := filepath.Join(c.dir, "elections.nk")
	if err == nil {
		err = os.WriteFile(file, seed, 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return file
}

// startNATS starts one server over what it has stored.
func (c *cluster) startNATS(i int) {
	c.t.Helper()
	file := filepath.Join(c.dir, fmt.Sprintf("nats%d.conf", i))
	public, err := c.voter.PublicKey()
	if err != nil {
		c.t.Fatal(err)
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(c.hosts[i].Addr(), port) }
	doc := fmt.Sprintf(`
server_name: n%d
logtime: true
debug: %t
listen: "%s"
http: "%s"
jetstream: {store_dir: %q, max_mem: 64MB, max_file: 2GB, sync_interval: always}
ping_interval: "1s"
ping_max: 2
write_deadline: "2s"
lame_duck_grace_period: "1s"
lame_duck_duration: "30s"
no_auth_user: culvert
accounts: {
  "$SYS": {users: [{nkey: %s, permissions: {publish: ["$NRG.V.>", "$SYS.REQ.SERVER.PING.JSZ", "$SYS.REQ.SERVER.PING.RAFTZ"], subscribe: ["_INBOX.>", "$NRG.V.>"]}}]}
  CULVERT: {jetstream: enabled, users: [{user: culvert, password: culvert}]}
}
cluster: {name: culvert, ping_interval: "1s", ping_max: 2, listen: "%s", routes: ["%s"]}
`, i+1, os.Getenv(debugEnv) != "", at(natsPort), at(pagePort), filepath.Join(c.dir, fmt.Sprintf("nats%d", i)), public, at(routePort), c.each(routePort, "nats://", `", "`))
	if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
		c.t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	c.nats[i] = start(c.t, c.hosts[i], filepath.Join(c.dir, fmt.Sprintf("nats%d.log", i)), []string{natsEnv + "=" + file}, exe)
}

func (c *cluster) awaitNATS(i int) {
	c.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		conn, err := c.hosts[i].Dial(c.t.Context(), "tcp", netip.AddrPortFrom(c.hosts[i].Addr(), natsPort).String())
		if err == nil {
			_ = conn.Close()
			return
		}
	}
	c.t.Fatalf("nats does not start:\n%s", tail(c.nats[i].log))
}

// stream is what a server says of one.
type stream struct {
	Name  string `json:"name"`
	State struct {
		Messages uint64 `json:"messages"`
		First    uint64 `json:"first_seq"`
		Last     uint64 `json:"last_seq"`
	} `json:"state"`
	Cluster struct {
		Leader   string `json:"leader"`
		Replicas []struct {
			Current bool `json:"current"`
			Offline bool `json:"offline"`
		} `json:"replicas"`
	} `json:"cluster"`
}

// streams asks a server for the streams that it has, nothing where it does not answer.
func (c *cluster) streams(i int) map[string]stream {
	resp, err := c.hosts[i].Client(time.Second).Get(fmt.Sprintf("http://%s/jsz?streams=1", netip.AddrPortFrom(c.hosts[i].Addr(), pagePort)))
	if err != nil {
		return nil
	}
	defer resp.Body.Close()
	var page struct {
		Accounts []struct {
			Streams []stream `json:"stream_detail"`
		} `json:"account_details"`
	}
	if json.NewDecoder(resp.Body).Decode(&page) != nil {
		return nil
	}
	out := map[string]stream{}
	for _, a := range page.Accounts {
		for _, s := range a.Streams {
			out[s.Name] = s
		}
	}
	return out
}

// The streams that a join needs.
var needed = []string{"KV_culvert", "culvert_audit"}

// wholeAgain is how long a cluster may take until every replica is up to date again. A server that led while it was cut off takes back what
// it was given meanwhile one message in two seconds (nats-server 2.15).
const wholeAgain = 5 * time.Minute

// leader waits until the cluster is whole, every replica of what joins need up to date, and gives the server that leads the leases.
func (c *cluster) leader() int {
	c.t.Helper()
	began := time.Now()
	for time.Since(began) < wholeAgain {
		whole, leader := 0, -1
		for i := range c.hosts {
			all := c.streams(i)
			for _, name := range needed {
				s, ok := all[name]
				if !ok || s.Cluster.Leader != fmt.Sprintf("n%d", i+1) {
					continue
				}
				if name == needed[0] {
					leader = i
				}
				current := 0
				for _, r := range s.Cluster.Replicas {
					if r.Current && !r.Offline {
						current++
					}
				}
				if current == len(c.hosts)-1 {
					whole++
				}
			}
		}
		if whole == len(needed) && leader >= 0 {
			if took := time.Since(began); took > 10*time.Second {
				c.t.Logf("the cluster is whole again after another %s", took.Round(time.Second))
			}
			return leader
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.t.Fatal("the cluster is never whole again")
	return 0
}

// agree waits until every server has the same of what joins need, and every coordinator knows of as many sessions as the others, and of at least so many:
// what was cut off has come round.
func (c *cluster) agree(sessions int) {
	c.t.Helper()
	c.leader()
	var known, stored string
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(200 * time.Millisecond) {
		counts, states := map[int]bool{}, map[string]bool{}
		known, stored = "", ""
		for _, n := range c.nodes {
			count := n.sessions()
			counts[count] = true
			known += fmt.Sprintf(" %d", count)
		}
		for i := range c.hosts {
			all, state := c.streams(i), ""
			for _, name := range needed {
				state += fmt.Sprintf(" %s %+v", name, all[name].State)
			}
			states[state] = true
			stored += state
		}
		if len(counts) == 1 && len(states) == 1 && !counts[0] {
			for count := range counts {
				if count < sessions {
					c.t.Errorf("coordinators know of %d sessions, and %d stand", count, sessions)
				}
			}
			return
		}
	}
	c.t.Errorf("after a minute without load coordinators know of%s sessions, and servers have%s", known, stored)
}

// bystander gives a server that leads nothing that a join needs.
func (c *cluster) bystander() int {
	c.t.Helper()
	c.leader()
	for i := range c.hosts {
		all, leads := c.streams(i), false
		for _, name := range needed {
			leads = leads || all[name].Cluster.Leader == fmt.Sprintf("n%d", i+1)
		}
		if len(all) > 0 && !leads {
			return i
		}
	}
	c.t.Fatal("every server leads something")
	return 0
}

// cut takes a host away from others by the network; the function that it gives heals that.
func (c *cluster) cut(h *lab.Host, others ...*lab.Host) (heal func()) {
	c.t.Helper()
	each := func(f func(a, b netip.Addr) error) {
		c.t.Helper()
		for _, o := range others {
			if o == h {
				continue
			}
			if err := f(h.Public(), o.Public()); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	each(c.net.Block)
	return func() { each(c.net.Unblock) }
}

// everybody lists all hosts but the jobs'.
func (c *cluster) everybody() []*lab.Host {
	out := append([]*lab.Host{}, c.hosts...)
	for _, n := range c.nodes {
		out = append(out, n.host)
	}
	return out
}

// run runs the coordinator's program on a node's host.
func (c *cluster) run(n *node, args ...string) (out []byte) {
	c.t.Helper()
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	code, err := n.host.Run(ctx, lab.Program{Path: binary(), Args: append(args, "--config", n.config), Stdout: &stdout, Stderr: &stderr})
	if err != nil || code != 0 {
		c.t.Fatalf("%s: exit code %d, %v\n%s\n%s", args, code, err, stdout.String(), stderr.String())
	}
	return stdout.Bytes()
}

// joined gives the sessions that the audit log has a join's record of.
func (c *cluster) joined(n *node) map[string]bool {
	c.t.Helper()
	return joinsIn(c.t, c.run(n, "audit", "export"))
}

// joinsIn gives the sessions that an export has a join's record of.
func joinsIn(t testing.TB, export []byte) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	lines := bufio.NewScanner(bytes.NewReader(export))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r struct {
			Session struct {
				UID string `json:"uid"`
			} `json:"session"`
			Metadata struct {
				EventCode string `json:"event_code"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%s: %v", lines.Bytes(), err)
		}
		if r.Metadata.EventCode == "session.join" {
			found[r.Session.UID] = true
		}
	}
	return found
}

const (
	keepEnv  = "CULVERT_E2E_LOGS"  // a folder to which every log is copied in the end
	debugEnv = "CULVERT_E2E_DEBUG" // if set, the servers tell all they do
)

// keep copies the logs to a folder of the test's own below dir.
func (c *cluster) keep(dir string) {
	dir = filepath.Join(dir, fmt.Sprintf("%s-%d", strings.ReplaceAll(c.t.Name(), "/", "-"), time.Now().Unix()))
	err := os.MkdirAll(dir, 0o755)
	copyOf := func(log, name string) {
		data, rerr := os.ReadFile(log)
		err = errors.Join(err, rerr, os.WriteFile(filepath.Join(dir, name), data, 0o644))
	}
	for i := range c.hosts {
		copyOf(c.nats[i].log, fmt.Sprintf("nats%d", i))
	}
	for i, n := range c.nodes {
		copyOf(n.log, fmt.Sprintf("coordinator%d", i))
	}
	if err != nil {
		c.t.Log(err)
	}
	c.t.Logf("the logs are in %s", dir)
}

// tell shows the logs.
func (c *cluster) tell() {
	for i := range c.hosts {
		c.t.Logf("nats %d:\n%s", i, tail(c.nats[i].log))
	}
	for i, n := range c.nodes {
		c.t.Logf("coordinator %d:\n%s", i, tail(n.log))
	}
}
