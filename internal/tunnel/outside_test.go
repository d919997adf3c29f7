package tunnel

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// stranger plays a device outside this process: a stock wireguard-go with its own bind, which knows nothing of paths.
type stranger struct {
	device *device.Device
	port   uint16

	mu     sync.Mutex
	peers  map[wire.Key]netip.AddrPort
	closed bool
	refuse error // what the next AddPeer answers
}

var _ Device = (*stranger)(nil)

func newStranger(t *testing.T) (*stranger, *tuntest.ChannelTUN) {
	t.Helper()
	ct := tuntest.NewChannelTUN()
	s := &stranger{peers: map[wire.Key]netip.AddrPort{}}
	s.device = device.NewDevice(ct.TUN(), conn.NewStdNetBind(), device.NewLogger(device.LogLevelSilent, ""))
	t.Cleanup(s.device.Close)
	if err := s.device.Up(); err != nil {
		t.Fatal(err)
	}
	state, err := s.device.IpcGet()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(state) {
		_, _ = fmt.Sscanf(line, "listen_port=%d", &s.port)
	}
	return s, ct
}

func (s *stranger) Listen(ctx context.Context) (*udpconn.Conn, error) {
	return udpconn.Listen(ctx, udpconn.Options{Network: "udp4", Addr: "127.0.0.1:0"})
}

func (s *stranger) Addr() netip.AddrPort { return loopback(s.port) }

func (s *stranger) SetKey(key wire.PrivateKey) error {
	return s.device.IpcSet("private_key=" + hex.EncodeToString(key.Bytes()) + "\n")
}

func (s *stranger) AddPeer(key wire.Key, endpoint netip.AddrPort, allowed []netip.Prefix) error {
	s.mu.Lock()
	s.peers[key] = endpoint
	refuse := s.refuse
	s.mu.Unlock()
	if refuse != nil {
		return refuse
	}
	if err := s.device.IpcSet(fmt.Sprintf("public_key=%s\nendpoint=%s\n", key.Hex(), endpoint)); err != nil {
		return err
	}
	return s.SetAllowedIPs(key, allowed)
}

func (s *stranger) SetAllowedIPs(key wire.Key, allowed []netip.Prefix) error {
	text := fmt.Sprintf("public_key=%s\nupdate_only=true\nreplace_allowed_ips=true\n", key.Hex())
	for _, prefix := range allowed {
		text += fmt.Sprintf("allowed_ip=%s\n", prefix)
	}
	return s.device.IpcSet(text)
}

func (s *stranger) RemovePeer(key wire.Key) error {
	s.mu.Lock()
	delete(s.peers, key)
	s.mu.Unlock()
	s.device.RemovePeer(device.NoisePublicKey(key))
	return nil
}

func (s *stranger) Shake(key wire.Key) error {
	p := s.device.LookupPeer(device.NoisePublicKey(key))
	if p == nil {
		return errors.New("no such peer") // it was removed meanwhile
	}
	return p.SendHandshakeInitiation(false)
}

func (s *stranger) Seen(key wire.Key) (Seen, error) {
	return Seen{Handshake: time.Unix(1, 0), RxBytes: 11, TxBytes: 12}, nil
}

func (s *stranger) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *stranger) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.peers)
}

// newOutsideEnd is a tunnel in front of a device outside this process.
func newOutsideEnd(t *testing.T) (*end, *stranger) {
	t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	s, ct := newStranger(t)
	tunnel, err := New(Options{Key: key, Device: s, Window: 128})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tunnel.Close() })
	return &end{Tunnel: tunnel, key: key, tun: ct}, s
}

// A device that knows no paths speaks with a gateway that takes packets from validated paths only; the handshake begins without
// any packet of the job's.
func TestDeviceOutsideThisProcess(t *testing.T) {
	gateway := newEnd(t)
	client, s := newOutsideEnd(t)
	c, g := join(t, client, gateway, gateway.Port())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.WaitHandshake(ctx); err != nil {
		t.Fatal(err)
	}
	ping(t, client, gateway)
	if got := c.Status(); got.Path.Kind != wire.Host || got.RxBytes != 11 || got.TxBytes != 12 || !got.Handshake.Equal(time.Unix(1, 0)) {
		t.Errorf("the status is not what the device says: %+v", got)
	}
	if got := g.Status(); got.Path.Remote != loopback(client.Port()) {
		t.Errorf("the gateway hears of the device by %v, want the tunnel's port %d", got.Path.Remote, client.Port())
	}
	peers := client.Peers()
	if len(peers) != 1 || peers[0].Key != gateway.PublicKey() || peers[0].Endpoint != loopback(gateway.Port()) || len(peers[0].AllowedIPs) != 1 {
		t.Errorf("peers are %+v", peers)
	}
	client.RemovePeer(c)
	if n := s.count(); n != 0 {
		t.Errorf("the device has %d peers left", n)
	}
	key, _ := wire.NewPrivateKey()
	if err := client.SetKey(key); err != nil { // as for the next session
		t.Fatal(err)
	}
	client.key = key
	join(t, client, gateway, gateway.Port())
	ping(t, client, gateway)
	if err := client.Close(); err != nil || !s.closed {
		t.Errorf("closing: %v, the device is closed: %v", err, s.closed)
	}
	if _, err := client.AddPeer(PeerOptions{Key: gateway.PublicKey(), Session: "late"}); err == nil {
		t.Error("a closed tunnel takes a peer")
	}
}

// What the device takes from elsewhere, or somebody else sends to its line, goes nowhere.
func TestNobodyElseSpeaksForTheDevice(t *testing.T) {
	gateway := newEnd(t)
	client, s := newOutsideEnd(t)
	join(t, client, gateway, gateway.Port())
	ping(t, client, gateway)
	other, err := net.Dial("udp4", s.peers[gateway.PublicKey()].String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	data := make([]byte, 100)
	data[0] = device.MessageTransportType
	before := client.Stats().Stranger
	if _, err := other.Write(data); err != nil {
		t.Fatal(err)
	}
	within(t, 30*time.Second, "the packet is a stranger's", func() bool { return client.Stats().Stranger > before })
	ping(t, client, gateway)
}

// A session's move to its standby: what may be sent goes to the other peer in one step, and each has a line of its own.
func TestDeviceOutsideMovesToAnotherPeer(t *testing.T) {
	first, second := newEnd(t), newEnd(t)
	client, s := newOutsideEnd(t)
	c1, _ := join(t, client, first, first.Port())
	ping(t, client, first)
	session := wire.StandbyID(client.PublicKey(), second.PublicKey())
	if _, err := second.AddPeer(PeerOptions{
		Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)},
	}); err != nil {
		t.Fatal(err)
	}
	c2, err := client.AddPeer(PeerOptions{Key: second.PublicKey(), Session: session, Candidates: hostCandidate(second.Port()), Initiate: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c2.WaitHandshake(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c2.SetAllowedIPs([]netip.Prefix{netip.PrefixFrom(gatewayIP, 32)}); err != nil {
		t.Fatal(err)
	}
	client.RemovePeer(c1)
	ping(t, client, second)
	if n := s.count(); n != 1 {
		t.Errorf("the device has %d peers, want 1", n)
	}
}

func TestDeviceOutsideThatRefuses(t *testing.T) {
	client, s := newOutsideEnd(t)
	s.refuse = errors.New("no")
	key, _ := wire.NewPrivateKey()
	if _, err := client.AddPeer(PeerOptions{Key: key.Public(), Session: "s"}); !errors.Is(err, s.refuse) {
		t.Errorf("got %v", err)
	}
	if n := s.count(); n != 0 {
		t.Errorf("%d peers are left", n)
	}
	for name, o := range map[string]Options{"neither": {Key: client.key}, "both": {Key: client.key, Device: s, TUN: tuntest.NewChannelTUN().TUN()}} {
		if _, err := New(o); err == nil {
			t.Errorf("a tunnel with %s of TUN and device was opened", name)
		}
	}
}
