//go:build linux

package scale

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// cluster is three nats-servers and three coordinators on it.
type cluster struct {
	t     testing.TB
	dir   string
	hosts []string // of the nats-servers, on loopback
	nats  []*process
	nodes []*node
	url   string
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir(), url: "https://culvert.test"}
	net2, net3 := 64+rand.IntN(128), 1+rand.IntN(250)
	for i := range 3 {
		c.hosts = append(c.hosts, fmt.Sprintf("127.%d.%d.%d", net2, net3, i+1))
	}
	for i := range c.hosts {
		c.nats = append(c.nats, nil)
		c.startNATS(i)
	}
	for i := range c.hosts {
		c.awaitNATS(i)
	}
	issuer := "http://" + freeAddr(t)
	urls := "nats://" + strings.Join(c.hosts, ":4222, nats://") + ":4222"
	for range 3 {
		c.nodes = append(c.nodes, newNode(t, issuer, c.url, "state: {nats: ["+urls+"]}\naudit: {max_size: 256MiB, log: off}\n"))
	}
	for _, n := range c.nodes { // one after the other: the first makes the streams
		n.serve()
		n.ready()
	}
	return c
}

// startNATS starts one server over what it has stored.
func (c *cluster) startNATS(i int) {
	c.t.Helper()
	file := filepath.Join(c.dir, fmt.Sprintf("nats%d.conf", i))
	doc := fmt.Sprintf(`
server_name: n%d
listen: "%s:4222"
jetstream: {store_dir: %q, max_mem: 64MB, max_file: 2GB, sync_interval: always}
ping_interval: "1s"
ping_max: 2
write_deadline: "2s"
cluster: {name: culvert, ping_interval: "1s", ping_max: 2, listen: "%s:6222", routes: ["nats://%s"]}
`, i+1, c.hosts[i], filepath.Join(c.dir, fmt.Sprintf("nats%d", i)), c.hosts[i], strings.Join(c.hosts, `:6222", "nats://`)+":6222")
	if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
		c.t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	c.nats[i] = start(c.t, filepath.Join(c.dir, fmt.Sprintf("nats%d.log", i)), []string{natsEnv + "=" + file}, exe)
}

func (c *cluster) awaitNATS(i int) {
	c.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", c.hosts[i]+":4222")
		if err == nil {
			_ = conn.Close()
			return
		}
	}
	c.t.Fatalf("nats does not start:\n%s", tail(c.nats[i].log))
}

// joined gives the sessions that the audit log has a join's record of.
func (c *cluster) joined(n *node) map[string]bool {
	c.t.Helper()
	var out, problems bytes.Buffer
	cmd := exec.Command(binary(), "audit", "export", "--config", n.config)
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		c.t.Fatalf("export the audit log: %v\n%s", err, problems.String())
	}
	found := map[string]bool{}
	lines := bufio.NewScanner(&out)
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
			c.t.Fatalf("%s: %v", lines.Bytes(), err)
		}
		if r.Metadata.EventCode == "session.join" {
			found[r.Session.UID] = true
		}
	}
	return found
}

// clusterEnv asks for this test, which takes a minute and a machine of its own: make cluster.
const clusterEnv = "CULVERT_E2E_CLUSTER"

// TestClusterLosesNothing: under load coordinators and nats-servers die by kill -9, one after the other, and come back, and one server
// stops answering for a while, as if it were cut off. No session is lost, no address given twice, no acknowledged record
// missing, and joins go on.
func TestClusterLosesNothing(t *testing.T) {
	if os.Getenv(clusterEnv) == "" {
		t.Skip("make cluster runs this")
	}
	c := newCluster(t)
	t.Cleanup(func() {
		if t.Failed() {
			c.tell()
		}
	})
	ids := filepath.Join(t.TempDir(), "ids")
	g := play(t, c.nodes, c.url, "--gateways", "6", "--sessions", "50", "--rate", "40", "--duration", "40s", "--renew-every", "6s", "--retry", "--timeout", "60s", "--ids", ids)
	awaitLines(t, ids, 100)
	c.nodes[0].kill()
	awaitLines(t, ids, 180)
	c.nodes[0].serve()
	awaitLines(t, ids, 240)
	c.nats[1].kill()
	awaitLines(t, ids, 320)
	c.startNATS(1)
	c.torment(ids)
	r := g.report()
	r.clean(t)
	p := r.Phases[len(r.Phases)-1]
	t.Logf("%d joins, p99 %.0f ms, longest gap %.0f ms, %d renewals, %d sessions", p.Joins, p.P99, p.Gap, r.Renewals, r.Sessions)
	if r.Renewals == 0 {
		t.Error("nothing was renewed")
	}
	recorded := c.joined(c.nodes[1])
	data, err := os.ReadFile(ids)
	if err != nil {
		t.Fatal(err)
	}
	for id := range strings.FieldsSeq(string(data)) {
		if !recorded[id] {
			t.Errorf("the join of %s was acknowledged and is not on record", id)
		}
	}
	verify := exec.Command(binary(), "audit", "verify", "--config", c.nodes[1].config)
	if out, err := verify.CombinedOutput(); err != nil {
		t.Errorf("audit verify: %v\n%s", err, out)
	}
}

// tell shows the logs.
func (c *cluster) tell() {
	for i := range 3 {
		c.t.Logf("coordinator %d:\n%s\nnats %d:\n%s", i, tail(c.nodes[i].log), i, tail(c.nats[i].log))
	}
}

// torment is the second half.
func (c *cluster) torment(ids string) {
	awaitLines(c.t, ids, 600)
	c.nats[2].signal(syscall.SIGSTOP)
	awaitLines(c.t, ids, 700) // joins go on without it
	c.nats[2].signal(syscall.SIGCONT)
	awaitLines(c.t, ids, 900)
	for i, n := range c.nodes[1:] {
		n.kill()
		awaitLines(c.t, ids, 1000+100*i)
		n.serve()
		n.ready()
	}
	c.nats[0].kill()
	awaitLines(c.t, ids, 1300)
	c.startNATS(0)
}

// awaitLines waits until a file has so many.
func awaitLines(t testing.TB, file string, n int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if data, err := os.ReadFile(file); err == nil && bytes.Count(data, []byte("\n")) >= n {
			return
		}
	}
	t.Fatalf("there are never %d sessions", n)
}
