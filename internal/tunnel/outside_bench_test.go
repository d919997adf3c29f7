package tunnel

import (
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// mute is a device outside this process that says nothing of its own.
type mute struct{ conn *udpconn.Conn }

func (m *mute) Listen(ctx context.Context) (*udpconn.Conn, error) {
	return udpconn.Listen(ctx, udpconn.Options{Network: "udp4", Addr: "127.0.0.1:0"})
}
func (m *mute) Addr() netip.AddrPort                                 { return m.conn.LocalAddr() }
func (*mute) SetKey(wire.PrivateKey) error                           { return nil }
func (*mute) AddPeer(wire.Key, netip.AddrPort, []netip.Prefix) error { return nil }
func (*mute) SetAllowedIPs(wire.Key, []netip.Prefix) error           { return nil }
func (*mute) RemovePeer(wire.Key) error                              { return nil }
func (*mute) Shake(wire.Key) error                                   { return nil }
func (*mute) Seen(wire.Key) (Seen, error)                            { return Seen{}, nil }
func (m *mute) Close() error                                         { return m.conn.Close() }

// BenchmarkForwarder is what a device outside this process costs beside its encryption: full-sized packets go from a device to a path, over
// the path to another tunnel, and from there to its device.
func BenchmarkForwarder(b *testing.B) {
	var ends [2]*Tunnel
	var devices [2]*mute
	for i := range ends {
		c, err := udpconn.Listen(b.Context(), udpconn.Options{Network: "udp4", Addr: "127.0.0.1:0"})
		if err != nil {
			b.Fatal(err)
		}
		devices[i] = &mute{c}
		key, _ := wire.NewPrivateKey()
		if ends[i], err = New(Options{Key: key, Device: devices[i]}); err != nil {
			b.Fatal(err)
		}
		defer ends[i].Close()
	}
	session := ends[0].PublicKey().SessionID()
	if _, err := ends[1].AddPeer(PeerOptions{Key: ends[0].PublicKey(), Session: session}); err != nil {
		b.Fatal(err)
	}
	up := make(chan struct{}, 16)
	p, err := ends[0].AddPeer(PeerOptions{
		Key: ends[1].PublicKey(), Session: session, Candidates: hostCandidate(ends[1].Port()), Initiate: true,
		OnPath: func(Path) { up <- struct{}{} },
	})
	if err != nil {
		b.Fatal(err)
	}
	<-up
	line := p.line.Load().conn.LocalAddr()
	pkt := make([]byte, DefaultMTU+overhead)
	binary.LittleEndian.PutUint32(pkt, device.MessageTransportType)
	out, in := devices[0].conn.NewQueue(outsideBatch), devices[1].conn.NewBatch(outsideBatch)
	b.SetBytes(int64(len(pkt)))
	b.ReportAllocs()
	got := 0
	for sent := 0; b.Loop(); {
		for ; sent-got < 2*outsideBatch; sent++ { // one by one, as the kernel's WireGuard sends them
			out.Add(pkt, len(pkt), line, netip.Addr{})
		}
		out.FlushWait(time.Second)
		if err := in.Read(); err != nil {
			b.Fatal(err)
		}
		for i := range in.Len() {
			d := in.Datagram(i)
			got += (len(d.Data) + d.Segment - 1) / d.Segment
		}
	}
	b.ReportMetric(float64(got*len(pkt)*8)/b.Elapsed().Seconds()/1e6, "Mbit/s")
	b.ReportMetric(0, "MB/s")
}
