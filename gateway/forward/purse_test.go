package forward

import (
	"crypto/sha256"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/policy"
)

// TestPurseProperty: whatever sessions borrow and pay back, no purse lends more than it has, a refusal changes nothing, nobody
// is refused what is there, and the process's purse has lent what the sessions' have.
func TestPurseProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		amounts := rapid.Int64Range(0, 100)
		process := purse{limit: amounts.Draw(t, "process")}
		sessions := make([]purse, rapid.IntRange(1, 4).Draw(t, "sessions"))
		lent := make([]int64, len(sessions))
		for i := range sessions {
			sessions[i] = purse{limit: amounts.Draw(t, "session"), from: &process}
		}
		var all int64
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				i, n, spare := rapid.IntRange(0, len(sessions)-1).Draw(t, "i"), amounts.Draw(t, "n"), rapid.Int64Range(0, 20).Draw(t, "spare")
				room := lent[i]+n+spare <= sessions[i].limit && all+n+spare <= process.limit
				if got := sessions[i].take(n, spare); got != room {
					t.Fatalf("%d of %d with %d lent, %d of %d in all, sparing %d: %v", n, sessions[i].limit, lent[i], all, process.limit, spare, got)
				}
				if room {
					lent[i], all = lent[i]+n, all+n
				}
			},
			"give": func(t *rapid.T) {
				i := rapid.IntRange(0, len(sessions)-1).Draw(t, "i")
				n := rapid.Int64Range(0, lent[i]).Draw(t, "n")
				sessions[i].give(n)
				lent[i], all = lent[i]-n, all-n
			},
			"": func(t *rapid.T) {
				if got := process.lent.Load(); got != all {
					t.Fatalf("the process has lent %d, its sessions %d", got, all)
				}
				for i := range sessions {
					if got := sessions[i].lent.Load(); got != lent[i] {
						t.Fatalf("session %d has lent %d, want %d", i, got, lent[i])
					}
				}
			},
		})
	})
}

// TestPurseIsNeverOverdrawn takes and gives from many goroutines at once.
func TestPurseIsNeverOverdrawn(t *testing.T) {
	const limit, each = 1000, 300
	process := purse{limit: limit}
	var out atomic.Int64
	var work sync.WaitGroup
	for i := range 8 {
		session := &purse{limit: 600, from: &process}
		work.Go(func() {
			for n := range 5000 {
				amount := int64((n*7+i)%each + 1)
				if !session.take(amount, 0) {
					continue
				}
				if got := out.Add(amount); got > limit {
					t.Errorf("%d of %d are out", got, limit)
				}
				out.Add(-amount)
				session.give(amount)
			}
		})
	}
	work.Wait()
	if got := process.lent.Load(); got != 0 {
		t.Errorf("%d have not been paid back", got)
	}
}

// stall opens n connections from a job's address to a target that pours, and reads nothing from them.
func (e *env) stall(n int, from netip.Addr, target string) (close func()) {
	e.t.Helper()
	var conns []net.Conn
	for range n {
		var wq waiter.Queue
		ep, terr := e.job.Stack().NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
		if terr != nil {
			e.t.Fatal(terr)
		}
		ep.SocketOptions().SetReceiveBufferSize(4096, true)
		if terr := ep.Bind(tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(from.AsSlice())}); terr != nil {
			e.t.Fatal(terr)
		}
		ep.Connect(full(netip.MustParseAddrPort(target)))
		conns = append(conns, gonet.NewTCPConn(&wq, ep))
		eventually(e.t, "the job connects", func() bool { return tcp.EndpointState(ep.State()) == tcp.StateEstablished })
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
	}
}

// held is what the stack holds for a session's TCP flows, in bytes: what the job has sent and the target not taken, and what
// the target has sent, some of which the job may have acknowledged.
func (s *Session) held() (n int64) {
	for _, fl := range s.open() {
		if fl.key.proto != policy.TCP {
			continue
		}
		if ep := s.f.endpoint(endpointID(fl.key.src, fl.key.dst)); ep != nil {
			waiting, _ := ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
			n += int64(waiting) + int64(fl.down.Load())
		}
	}
	return n
}

// mostPinned is what one session can pin, as the comment on purses says.
func mostPinned(l Limits) int64 {
	small := int64(max(0, l.SessionFlows-smallFrom))
	return l.SessionBytes + min(smallFrom, int64(l.SessionFlows))*(sendFloor+receiveFloor) + small*2*smallFloor
}

func pour(c *net.TCPConn) { pourInto(c) }

// TestStalledSession: a session that takes nothing of what it asked for pins no more than is said, runs its own purse out, and
// another session beside it gets all that it needs; when it ends, everything is paid back.
func TestStalledSession(t *testing.T) {
	limits := Limits{SessionBytes: 8 << 20, SessionFlows: smallFrom + 64}
	e := newEnv(t, limits)
	other := e.add("session-2", other4)
	target := server(t, "tcp4", pour)
	if want := int64(172 << 20); mostPinned(Limits{SessionBytes: 64 << 20, SessionFlows: 4096}) != want {
		t.Errorf("by default a session can pin %d bytes, want %d", mostPinned(Limits{SessionBytes: 64 << 20, SessionFlows: 4096}), want)
	}
	closeAll := e.stall(limits.SessionFlows, job4, target)
	floors := int64(smallFrom)*sendFloor + 64*smallFloor
	eventually(t, "the stalled flows take their floors and most of the purse", func() bool { return e.s.held() > floors+limits.SessionBytes/2 })
	if lent := e.s.purse.lent.Load(); lent > limits.SessionBytes {
		t.Errorf("the session has been lent %d bytes of %d", lent, limits.SessionBytes)
	}
	if held, most := e.s.held(), mostPinned(limits); held > most {
		t.Errorf("the stack holds %d bytes for one session, want %d at most", held, most)
	}

	const size = 16 << 20
	want := sha256.New()
	source := server(t, "tcp4", func(c *net.TCPConn) { _, _ = c.Write(make([]byte, size)) })
	want.Write(make([]byte, size))
	c, err := e.dialFrom(other4, netip.MustParseAddrPort(source), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := sha256.New()
	if n, err := io.Copy(got, c); n != size || err != nil || string(got.Sum(nil)) != string(want.Sum(nil)) {
		t.Errorf("the other session gets %d bytes, %v", n, err)
	}
	if lent := other.purse.lent.Load(); lent > limits.SessionBytes {
		t.Errorf("the other session has been lent %d bytes", lent)
	}
	if held, most := e.s.held(), mostPinned(limits); held > most {
		t.Errorf("later the stack holds %d bytes for one session, want %d at most", held, most)
	}
	c.Close()
	closeAll()
	e.f.Remove(e.s)
	e.f.Remove(other)
	eventually(t, "everything is paid back", func() bool { return e.f.Load().Lent == 0 && e.s.purse.lent.Load() == 0 })
}

// TestStalledTarget: a target that takes nothing makes the gateway hold no more than the flow's buffer.
func TestStalledTarget(t *testing.T) {
	hold := make(chan struct{})
	target := server(t, "tcp4", func(*net.TCPConn) { <-hold })
	e := newEnv(t, Limits{SessionBytes: 1})
	c, err := e.dial(target)
	if err != nil {
		close(hold)
		t.Fatal(err)
	}
	var writes sync.WaitGroup
	writes.Go(func() { pourInto(c) })
	eventually(t, "the target's socket and the flow's buffer are full", func() bool {
		return e.s.Counts().BytesUp > 0 && e.s.held() > receiveFloor/4
	})
	const most = receiveFloor + 64<<10 // the stack takes the whole of a merged segment that begins inside of the window
	if held := e.s.held(); held > most {
		t.Errorf("the stack holds %d bytes of a flow that may have %d", held, most)
	}
	close(hold)
	c.Close()
	writes.Wait()
	eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
}

// pourInto writes until that fails.
func pourInto(w io.Writer) {
	b := make([]byte, 64<<10)
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// BenchmarkStalledSession fills one session of the default limits with flows whose target pours and whose job reads nothing, and
// tells what the stack holds for it.
func BenchmarkStalledSession(b *testing.B) {
	e := newEnv(b, Limits{SessionRate: 1 << 20})
	target := server(b, "tcp4", pour)
	for range b.N {
		closeAll := e.stall(4096, job4, target)
		floors := int64(smallFrom*sendFloor + (4096-smallFrom)*smallFloor)
		eventually(b, "most of the purse is lent", func() bool { return e.s.held() > floors+e.f.limits.SessionBytes*3/4 })
		b.ReportMetric(float64(e.s.held())/(1<<20), "MiB-held")
		b.ReportMetric(float64(mostPinned(e.f.limits))/(1<<20), "MiB-bound")
		closeAll()
	}
}
