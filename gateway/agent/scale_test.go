package agent

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// fill admits n sessions to a plane without going through tokens.
func fill(tb testing.TB, p *plane, from, n int) []carrier {
	tb.Helper()
	grant, err := policy.ParseGrant([]wire.Grant{{Rule: "r", Allow: "tcp 10.20.0.5:5432"}})
	if err != nil {
		tb.Fatal(err)
	}
	var out []carrier
	for i := from; i < from+n; i++ {
		key := newKey(tb)
		var four [4]byte
		binary.BigEndian.PutUint32(four[:], 0xC6120100+uint32(i))
		six := gatewayAddrs[1].As16()
		copy(six[12:], four[:])
		addrs := []netip.Addr{netip.AddrFrom4(four), netip.AddrFrom16(six)}
		c, err := p.open(key.SessionID(), key, addrs, reach{}, &policy.Scope{Offered: grant})
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// BenchmarkOpen opens and closes one session's place in the real data plane that already holds others.
func BenchmarkOpen(b *testing.B) {
	for name, held := range map[string]int{"alone": 0, "among1000": 1000} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, nil)
			w.coord.hello()
			eventually(b, "the stream is up", w.gateway.stream.up)
			fill(b, w.gateway.plane, 0, held)
			b.ResetTimer()
			for i := range b.N {
				for _, c := range fill(b, w.gateway.plane, held+i%1000, 1) {
					c.Close()
				}
			}
		})
	}
}

// TestFloodOfOffers sends far more offers at once than the gateway verifies at once; all are answered and nothing lingers.
func TestFloodOfOffers(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Limits.Offers = 4; o.Limits.Sessions = 8 })
	w.coord.hello()
	good := w.join(nil)
	j := w.newJob()
	var wg sync.WaitGroup
	for i := range 200 {
		o := j.offer
		o.Key = newKey(t)
		o.Session = o.Key.SessionID()
		o.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{198, 18, 9, byte(i)}), o.Addresses[1]}
		if i%2 == 0 {
			o.Token = w.token(o.Key)
		}
		wg.Go(func() {
			if _, err := w.coord.ask(wire.FrameOffer, o); err != nil && problem.CodeOf(err) == problem.Failed {
				t.Errorf("offer: %v", err)
			}
		})
	}
	wg.Wait()
	if n := w.gateway.table.size(); n > 8 {
		t.Errorf("%d sessions, want 8 at most", n)
	}
	if err := good.usable(); err != nil {
		t.Errorf("the session that was there: %v", err)
	}
}

// TestCloseWithManySessions: stopping is quick however many sessions there are.
func TestCloseWithManySessions(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	eventually(t, "the stream is up", w.gateway.stream.up)
	for i, c := range fill(t, w.gateway.plane, 0, 300) {
		s := &session{id: string(rune('a' + i)), carrier: c, expires: time.Now().Add(time.Hour), ends: time.Now().Add(time.Hour)}
		if err := w.gateway.table.reserve(s); err != nil {
			t.Fatal(err)
		}
		w.gateway.table.open(s)
	}
	began := time.Now()
	if err := w.gateway.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("closing took %v", d)
	}
}

// TestDeadPeersHoardNothing: what is sent to sessions that have never shaken hands stays out of WireGuard, which would keep each packet in
// a buffer of 64 KiB: but for one each, so that it asks for keys.
func TestDeadPeersHoardNothing(t *testing.T) {
	const dead, packets = 500, 300
	w := newWorld(t, nil)
	w.coord.hello()
	eventually(t, "the stream is up", w.gateway.stream.up)
	p := w.gateway.plane
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	sessions := fill(t, p, 0, dead)
	before := held()
	packet := make([]byte, 1000)
	packet[0], packet[8], packet[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(packet[2:], uint16(len(packet)))
	for i := range dead {
		binary.BigEndian.PutUint32(packet[16:], 0xC6120100+uint32(i))
		for range packets {
			_ = p.device.Inject(packet) // some find no room
		}
	}
	eventually(t, "WireGuard is asked once for each", func() bool { return p.device.Stats().ReadPackets >= dead })
	if n := p.device.Stats().ReadPackets; n > 3*dead { // one more after five seconds
		t.Errorf("WireGuard has %d packets for peers that are not there", n)
	}
	if n := int64(held()) - int64(before); n > 400<<20 {
		t.Errorf("dead peers hold %d MB", n>>20)
	}
	for _, s := range sessions {
		s.Close()
	}
	eventually(t, "nothing waits for sessions that have ended", func() bool { return p.device.Depth() == 0 })
}

// TestNeedsNoPrivilege runs the main path again as a user without any right.
func TestNeedsNoPrivilege(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("all tests of this run are without privilege already")
	}
	dir, err := os.MkdirTemp("", "culvert-gateway")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "agent.test")
	for _, do := range []error{os.Chmod(dir, 0o755), os.WriteFile(file, binary, 0o755)} {
		if do != nil {
			t.Fatal(do)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, file, "-test.run", "^TestAJobReachesTheServiceAndNothingElse$|^TestRestartWithTheSameState", "-test.v")
	cmd.Dir = "/"
	cmd.Env = []string{"TMPDIR=" + os.TempDir(), "HOME=/"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "--- PASS") != 2 {
		t.Errorf("%v\n%s", err, out)
	}
}
