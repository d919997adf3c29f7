package tunnel

import (
	"encoding/binary"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/repair"
)

// numbered is a transport message with a counter.
func numbered(count uint64, size int) []byte {
	pkt := message(device.MessageTransportType, size)
	binary.LittleEndian.PutUint64(pkt[8:], count)
	for i := 16; i < size; i++ {
		pkt[i] = byte(count) ^ byte(i)
	}
	return pkt
}

func numberOf(pkt []byte) uint64 { return binary.LittleEndian.Uint64(pkt[8:]) }

// Over a path that loses packets in both directions, both sides find out, send parities, and rebuild; both say so.
func TestLossIsRepaired(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	var up, down atomic.Uint64
	m := newMiddle(t, gateway.Port(), func(isUp bool, pkt []byte) bool {
		n := &down
		if isUp {
			n = &up
		}
		return repair.IsTransport(pkt) && n.Add(1)%25 == 0
	})
	c, g := join(t, client, gateway, m.port())
	ping(t, client, gateway)

	quit := make(chan struct{})
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer close(quit)
	for from, to := range map[*end]*end{client: gateway, gateway: client} {
		packet := tuntest.Ping(gatewayIP, clientIP)
		if from == gateway {
			packet = tuntest.Ping(clientIP, gatewayIP)
		}
		tasks.Go(func() {
			for pause(4*time.Millisecond, quit) {
				select {
				case from.tun.Outbound <- packet:
				case <-quit:
				}
			}
		})
		tasks.Go(func() {
			for {
				select {
				case <-to.tun.Inbound:
				case <-quit:
					return
				}
			}
		})
	}
	for name, p := range map[string]*Peer{"client": c, "gateway": g} {
		within(t, 3*time.Minute, "the "+name+" rebuilds packets", func() bool { return p.Status().Rebuilt > 5 })
		if s := p.Status(); !s.Parities || s.Lost < 0.003 {
			t.Errorf("the %s's status is %+v", name, s)
		}
	}
	if n := gateway.Stats().Rebuilt; n < 5 {
		t.Errorf("the gateway has rebuilt %d packets", n)
	}
}

// A peer that does not say what it has got is sent no parity, however much is lost, and neither is one behind a WebSocket.
func TestOnlyWhoKnowsParitiesGetsThem(t *testing.T) {
	for name, c := range map[string]struct {
		header uint32
		known  bool
		want   bool
	}{"knows": {0, true, true}, "does not know": {0, false, false}, "websocket": {0x40000001, true, false}} {
		t.Run(name, func(t *testing.T) {
			_, p := loopbackBind(t, loopback(9))
			p.tunnel.log = slog.New(slog.DiscardHandler)
			chosen := &path{spot: spot{remote: loopback(9)}}
			if c.header != 0 {
				chosen.spot = spot{header: c.header}
			}
			p.engine.chosen = chosen
			for i := range uint32(20) {
				p.heedTally(nat.Tally{Known: c.known, Sent: 500 * i, Came: 490 * i}, time.Unix(int64(i), 0))
			}
			if got := p.parities.Load() != nil; got != c.want {
				t.Errorf("sends parities: %v", got)
			}
			p.uncover()
			if p.parities.Load() != nil {
				t.Error("parities go on on another path")
			}
		})
	}
}

// tap is a door that keeps what is sent.
type tap struct {
	mu  sync.Mutex
	got [][]byte
}

func (d *tap) send(packets [][]byte, _ *route) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range packets {
		d.got = append(d.got, append([]byte(nil), p...))
	}
	return nil
}

func (d *tap) take() [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	got := d.got
	d.got = nil
	return got
}

// Full groups have their parity behind the last packet, and what is left over has it a moment later.
func TestParitiesAreSentInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &bind{side: newSideEntrance(), in: newWindow(0), out: newWindow(0)}
		p := &Peer{tunnel: &Tunnel{bind: b}}
		out := &tap{}
		p.current.Store(&route{spot: spot{via: out, remote: loopback(9)}})
		p.cover(true)
		var batch [][]byte
		for i := range uint64(2*repair.GroupSize + 1) {
			batch = append(batch, numbered(i, 100))
		}
		if err := b.Send(batch, p); err != nil {
			t.Fatal(err)
		}
		got := out.take()
		if len(got) != len(batch)+2 || !repair.IsParity(got[repair.GroupSize]) || !repair.IsParity(got[2*repair.GroupSize+1]) {
			t.Fatalf("%d packets for %d: %x", len(got), len(batch), got)
		}
		time.Sleep(2*flushAfter + time.Millisecond)
		if got = out.take(); len(got) != 1 || !repair.IsParity(got[0]) || len(got[0]) != 100 {
			t.Fatalf("what is left over has %x", got)
		}
		time.Sleep(time.Second)
		if got = out.take(); len(got) != 0 {
			t.Fatalf("sent without a packet: %x", got)
		}
		_ = b.Send(batch[:1], p)
		p.cover(false) // in the middle of a group
		p.timers.Wait()
		if got = out.take(); len(got) != 1 {
			t.Errorf("sent after the end: %x", got)
		}
	})
}

// mending is a peer whose packets are rebuilt, and what the device gets of them.
func mending(t *testing.T) (m *mender, device <-chan []byte, p *Peer) {
	b := &bind{side: newSideEntrance(), in: newWindow(0), out: newWindow(0)}
	p = &Peer{tunnel: &Tunnel{bind: b}}
	m = p.mend()
	receive := b.side.open(b)
	out := make(chan []byte, 100)
	var tasks sync.WaitGroup
	tasks.Go(func() {
		bufs, sizes, eps := packets(8, device2K), make([]int, 8), make([]conn.Endpoint, 8)
		for {
			n, err := receive(bufs, sizes, eps)
			if err != nil {
				return
			}
			for i := range n {
				out <- append([]byte(nil), bufs[i][:sizes[i]]...)
			}
		}
	})
	t.Cleanup(func() {
		b.side.close()
		tasks.Wait()
	})
	return m, out, p
}

const device2K = 2048

// What waits for a packet that never comes, and no parity says so, comes out after a moment.
func TestWhatWaitsComesOutInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, out, p := mending(t)
		encoder := repair.NewEncoder()
		for i := range uint64(repair.GroupSize) {
			if parity := encoder.Add(nil, numbered(i, 100)); parity != nil {
				m.parity(parity)
			}
		}
		for _, c := range []uint64{repair.GroupSize + 1, repair.GroupSize + 2} {
			if now, more := m.packet(numbered(c, 100)); now || more {
				t.Fatal("what follows a gap does not wait")
			}
		}
		start := time.Now()
		for want := uint64(repair.GroupSize + 1); want < repair.GroupSize+3; want++ {
			if got := numberOf(<-out); got != want {
				t.Fatalf("packet %d comes out, want %d", got, want)
			}
		}
		if took := time.Since(start); took > 2*holdFor {
			t.Errorf("it took %v", took)
		}
		if now, _ := m.packet(numbered(repair.GroupSize+3, 100)); !now {
			t.Error("waits although nothing is missing")
		}
		m.packet(numbered(repair.GroupSize+9, 100))
		p.unmend(time.Time{}, true) // with a packet that waits, and a timer
		p.timers.Wait()
		if p.mender.Load() != nil || p.tunnel.bind.menders.Load() != 0 {
			t.Error("still kept")
		}
	})
}

// Packets are kept while parities come, and of so many peers.
func TestKeptPacketsAreBounded(t *testing.T) {
	b := &bind{}
	var peers []*Peer
	for i := range maxMenders + 10 {
		p := &Peer{tunnel: &Tunnel{bind: b}}
		if m := p.mend(); (m != nil) != (i < maxMenders) {
			t.Fatalf("peer %d: %v", i, m != nil)
		}
		peers = append(peers, p)
	}
	peers[0].unmend(time.Now(), false)
	if peers[0].mender.Load() == nil {
		t.Error("let go at once")
	}
	peers[0].unmend(time.Now().Add(mendFor+time.Second), false)
	if peers[0].mender.Load() != nil || peers[maxMenders].mend() == nil {
		t.Error("never let go")
	}
	closed := &Peer{tunnel: &Tunnel{bind: b}, closed: true}
	if closed.mend() != nil {
		t.Error("kept for a peer that is gone")
	}
}

// From anywhere but a validated path a parity is junk.
func TestParitiesOfStrangersAreJunk(t *testing.T) {
	b := &bind{}
	p := &Peer{tunnel: &Tunnel{bind: b}}
	parity := message(5, 100)
	parity[1] = repair.GroupSize
	from := &route{spot: spot{remote: loopback(9)}}
	unproven := &path{peer: p, spot: from.spot}
	for _, at := range []*path{nil, unproven} {
		if got, _ := b.accept(parity, at, from); got != nil {
			t.Error("taken")
		}
	}
	if n := b.counts.junk.Load(); n != 2 {
		t.Errorf("%d are junk", n)
	}
	unproven.open.Store(true)
	if got, _ := b.accept(parity, unproven, from); got != p {
		t.Error("not taken from a validated path")
	}
}
