//go:build linux

package agent

import (
	"encoding/binary"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// overlayOf gives the addresses of the i-th session.
func overlayOf(i int) []netip.Addr {
	var four [4]byte
	binary.BigEndian.PutUint32(four[:], 0xC6120400+uint32(i)) // from 198.18.4.0 on
	six := gatewayAddrs[1].As16()
	copy(six[12:], four[:])
	return []netip.Addr{netip.AddrFrom4(four), netip.AddrFrom16(six)}
}

// peer is a client's tunnel into a network stack of its own.
type peer struct {
	w      *world
	device *netstack.Device
	tunnel *tunnel.Tunnel
}

func newPeer(b *testing.B, w *world) *peer {
	b.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	device, err := netstack.New(netstack.Options{})
	if err != nil {
		b.Fatal(err)
	}
	dial := tunnel.DialRelay(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, nil)
	t, err := tunnel.New(tunnel.Options{Key: key, TUN: device, Window: 128, Relays: tunnel.RelayOptions{Dial: dial}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = t.Close() })
	return &peer{w, device, t}
}

// offer has the gateway admit the i-th session, with a key of its own and a token that the gateway verifies. It tells how long that took.
func (p *peer) offer(b *testing.B, i int, grants []wire.Grant) (wire.PrivateKey, *wire.Gateway, time.Duration) {
	b.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	offer := wire.Offer{
		Session: key.Public().SessionID(), Key: key.Public(), Token: p.w.token(key.Public()), Addresses: overlayOf(i), Grants: grants, Lease: wire.Duration(time.Hour),
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p.tunnel.Port())}},
	}
	began := time.Now()
	answer, err := p.w.coord.ask(wire.FrameOffer, offer)
	if err != nil {
		b.Fatal(err)
	}
	return key, answer.Gateway, time.Since(began)
}

// join makes the peer the i-th session: an offer, path checks, a handshake and a datagram that comes back.
func (p *peer) join(b *testing.B, i int, grants []wire.Grant) (*tunnel.Peer, time.Duration) {
	b.Helper()
	key, gateway, took := p.offer(b, i, grants)
	if err := p.tunnel.SetKey(key); err != nil {
		b.Fatal(err)
	}
	if err := p.device.SetAddresses(overlayOf(i)); err != nil {
		b.Fatal(err)
	}
	to, err := p.tunnel.AddPeer(tunnel.PeerOptions{
		Key: gateway.Key, Session: key.Public().SessionID(), Initiate: true,
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p.w.gateway.Port())}},
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
	})
	if err != nil {
		b.Fatal(err)
	}
	(&job{w: p.w, device: p.device}).ping(gateway.Addresses[0])
	return to, took
}

// BenchmarkIdleSessions has the gateway admit 10,000 sessions one after the other, every tenth of which comes up and shakes hands, and leaves
// them alone. Everything is in this process, coordinator, issuer and the client's end too: the figures are upper bounds.
func BenchmarkIdleSessions(b *testing.B) {
	const sessions, sample = 10_000, 100
	w := newWorld(b, nil)
	w.coord.hello()
	p := newPeer(b, w)
	grants := []wire.Grant{{Rule: "deploy", Allow: "tcp 10.20.0.5:5432"}}
	var first, last []time.Duration
	for i := range sessions + sample {
		var took time.Duration
		if i%10 == 0 {
			var to *tunnel.Peer
			to, took = p.join(b, i, grants)
			p.tunnel.RemovePeer(to)
		} else {
			_, _, took = p.offer(b, i, grants)
		}
		switch {
		case i < sample:
			first = append(first, took)
		case i >= sessions:
			last = append(last, took)
		}
		if i+1 == sessions/10 || i+1 == sessions {
			debug.FreeOSMemory()
			b.ReportMetric(idleWork(3*time.Second), fmt.Sprintf("cpu-ms/s-at-%d", i+1))
		}
	}
	debug.FreeOSMemory()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(resident(b), "RSS-MB")
	b.ReportMetric(middleOf(first), "first-join-ms")
	b.ReportMetric(middleOf(last), "last-join-ms")
	if n := w.gateway.table.size(); n != sessions+sample {
		b.Errorf("%d sessions are held", n)
	}
}

// idleWork is the processor time that this process takes for a while, in milliseconds a second.
func idleWork(d time.Duration) float64 {
	before := processorTime()
	time.Sleep(d)
	return float64((processorTime() - before).Microseconds()) / 1000 / d.Seconds()
}

// resident is this process's memory in MB (proc(5)).
func resident(b *testing.B) float64 {
	b.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	var size, pages int
	if _, err := fmt.Sscan(string(data), &size, &pages); err != nil {
		b.Fatal(err)
	}
	return float64(pages*os.Getpagesize()) / 1e6
}

func middleOf(all []time.Duration) float64 {
	slices.Sort(all)
	return float64(all[len(all)/2].Microseconds()) / 1000
}
