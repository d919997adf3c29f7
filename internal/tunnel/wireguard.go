package tunnel

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/wire"
)

// wireGuard is what speaks the protocol: wireguard-go in this process, or a device outside of it. Keys and peers are given to it in
// the order in which the tunnel has taken them.
type wireGuard interface {
	setKey(wire.PrivateKey) error
	knows(wire.Key) bool
	addPeer(*Peer) error
	setAllowedIPs(*Peer, []netip.Prefix) error
	removePeer(*Peer)
	// shake begins a handshake, which tries again until it is answered or given up.
	shake(*Peer)
	// status overwrites what the device itself counts.
	status(*Peer, *Status)
	close()
}

// inside is wireguard-go.
type inside struct{ device *device.Device }

func newInside(opts *Options, b *bind) (*inside, error) {
	tunDevice := &windowed{Device: opts.TUN, in: b.in, out: b.out, turns: b.turns, timer: stoppedTimer()}
	d := &inside{device.NewDevice(tunDevice, b, deviceLogger(opts.Logger))}
	config := fmt.Sprintf("private_key=%s\nlisten_port=%d\n", hex.EncodeToString(opts.Key.Bytes()), opts.Port)
	if err := d.device.IpcSet(config); err != nil {
		d.device.Close()
		return nil, fmt.Errorf("configure the wireguard device: %w", err)
	}
	if err := d.device.Up(); err != nil {
		d.device.Close()
		return nil, fmt.Errorf("open udp port %d: %w", opts.Port, err)
	}
	if b.port() == 0 {
		d.device.Close()
		return nil, fmt.Errorf("open udp port %d: it was closed again", opts.Port)
	}
	return d, nil
}

func (d *inside) setKey(key wire.PrivateKey) error {
	return d.device.SetPrivateKey(device.NoisePrivateKey(key.Bytes()))
}

func (d *inside) knows(key wire.Key) bool {
	return d.device.LookupPeer(device.NoisePublicKey(key)) != nil
}

func (d *inside) addPeer(p *Peer) error {
	prefixes := p.opts.AllowedIPs
	if !p.opts.Initiate {
		prefixes = p.tunnel.owned(p)
	}
	return d.set(p, "endpoint="+p.opts.Session+"\n", prefixes)
}

func (d *inside) setAllowedIPs(p *Peer, prefixes []netip.Prefix) error {
	return d.set(p, "update_only=true\n", prefixes)
}

func (d *inside) set(p *Peer, more string, prefixes []netip.Prefix) error {
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%s\n%sreplace_allowed_ips=true\n", p.opts.Key.Hex(), more)
	for _, prefix := range prefixes {
		fmt.Fprintf(&b, "allowed_ip=%s\n", prefix)
	}
	return d.device.IpcSet(b.String())
}

func (d *inside) removePeer(p *Peer) { d.device.RemovePeer(device.NoisePublicKey(p.opts.Key)) }

func (d *inside) shake(p *Peer) {
	if peer := d.device.LookupPeer(device.NoisePublicKey(p.opts.Key)); peer != nil {
		_ = peer.SendHandshakeInitiation(false) // the device logs it and tries again
	}
}

func (*inside) status(*Peer, *Status) {}

// close closes the TUN first, so that no peer waits in it, then ends the peers.
func (d *inside) close() { d.device.Close() }
