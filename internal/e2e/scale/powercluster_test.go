//go:build linux

package scale

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab/vm"
)

// laxEnv has the servers sync when they like, as NATS does by default, to see what that loses.
const laxEnv = "CULVERT_E2E_LAX"

// servers puts the three nats-servers of a cluster into the machine, on one disk, and a coordinator before it, which stays.
func (p *plug) servers() {
	p.t.Helper()
	const first, routes = natsPort, routePort
	exe, err := os.Executable()
	p.must(err)
	sync := "always"
	if os.Getenv(laxEnv) != "" {
		sync = "2m"
	}
	var a vm.Archive
	var begin, urls, peers []string
	for i := range 3 {
		urls = append(urls, fmt.Sprintf("nats://%s", netip.AddrPortFrom(guestEnd, uint16(first+i))))
		peers = append(peers, fmt.Sprintf(`"nats://127.0.0.1:%d"`, routes+i))
	}
	for i := range 3 {
		a.File(fmt.Sprintf("n%d.conf", i), fmt.Appendf(nil, `
server_name: n%d
listen: "0.0.0.0:%d"
jetstream: {store_dir: "/disk/n%d", max_mem: 64MB, max_file: 2GB, sync_interval: %s}
no_auth_user: culvert
accounts: {CULVERT: {jetstream: enabled, users: [{user: culvert, password: culvert}]}}
cluster: {name: culvert, listen: "127.0.0.1:%d", no_advertise: true, routes: [%s]}
`, i+1, first+i, i, sync, routes+i, strings.Join(peers, ", ")), 0o600)
		begin = append(begin, fmt.Sprintf("%s=/n%d.conf\n/bin/nats\n", natsEnv, i))
	}
	a.File("bin/nats", p.read(exe), 0o755)
	a.File("begin", []byte(strings.Join(begin, "\n")), 0o644)
	p.pack(&a)
	p.up = func() bool {
		for i := range 3 {
			conn, err := p.host.Dial(p.t.Context(), "tcp", netip.AddrPortFrom(guestEnd, uint16(first+i)).String())
			if err != nil {
				return false
			}
			_ = conn.Close()
		}
		return true
	}
	p.node = newNode(p.t, p.host, "http://"+freeAddr(p.t, p.host), "", fmt.Sprintf("state: {nats: [%s]}\naudit: {max_size: 64MiB, log: off}\n", strings.Join(urls, ", ")))
}

// TestPowerLossOfServers pulls the plug of all three nats-servers of a cluster at once, again and again, while jobs join and renew at a coordinator that
// stays: no acknowledged record is missing and the log verifies, no address is given twice, and sessions live on.
func TestPowerLossOfServers(t *testing.T) {
	if os.Getenv(kernelEnv) == "" {
		t.Skip("make power runs this")
	}
	times := 3
	if n, err := strconv.Atoi(os.Getenv("CULVERT_E2E_KILLS")); err == nil {
		times = n
	}
	p := newPlug(t)
	p.servers()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the machine's console:\n%s\nthe coordinator:\n%s", tail(p.console), tail(p.node.log))
		}
	})
	t.Logf("servers listen %s after power came", p.on().Round(100*time.Millisecond))
	p.node.serve()
	p.node.ready()
	file := filepath.Join(p.dir, "ids")
	g := play(t, p.host, []*node{p.node}, "", "--gateways", "4", "--sessions", "20", "--rate", "4", "--duration", "20m", "--renew-every", "20s",
		"--retry", "--timeout", "90s", "--ids", file)
	tr := &trial{cluster: &cluster{t: t}, file: file}
	tr.goOn(21)
	for range times {
		tr.goOn(20 + p.random.IntN(30))
		p.off()
		data, err := os.ReadFile(file)
		p.must(err)
		acknowledged := strings.Fields(string(data))
		began := time.Now()
		took := p.on()
		tr.goOn(10)
		t.Logf("servers listen %s after power came back, and joins go on after %s", took.Round(100*time.Millisecond), time.Since(began).Round(100*time.Millisecond))
		recorded, missing := tr.joined(p.node), 0
		for _, id := range acknowledged {
			if !recorded[id] {
				missing++
			}
		}
		t.Logf("of %d joins that were acknowledged before, %d are not on record", len(acknowledged), missing)
		if missing > 0 {
			t.Errorf("%d acknowledged joins are not on record", missing)
		}
		tr.run(p.node, "audit", "verify")
	}
	_ = g.proc.Signal(syscall.SIGINT)
	r := g.report()
	r.clean(t)
	ph := r.Phases[len(r.Phases)-1]
	t.Logf("%d joins, p50 %.0f ms, p99 %.0f ms, longest gap %.0f ms, %d renewals, %d sessions", ph.Joins, ph.P50, ph.P99, ph.Gap, r.Renewals, r.Sessions)
}
