package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

var _ tunnel.Device = (*Device)(nil)

// set changes the device's configuration, one change after the other.
func (d *Device) set(what string, config wgtypes.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	if err := d.client.ConfigureDevice(wgName, config); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (d *Device) setPeer(what string, peer wgtypes.PeerConfig) error {
	return d.set(what, wgtypes.Config{Peers: []wgtypes.PeerConfig{peer}})
}

func (d *Device) listen() error {
	at := port
	return d.set("have wireguard listen", wgtypes.Config{ListenPort: &at})
}

// SetKey changes the device's key.
func (d *Device) SetKey(key wire.PrivateKey) error {
	private := wgtypes.Key(key.Bytes())
	return d.set("set wireguard's key", wgtypes.Config{PrivateKey: &private})
}

// AddPeer adds a peer whose packets go to endpoint, a socket of [Device.Listen].
func (d *Device) AddPeer(key wire.Key, endpoint netip.AddrPort, allowed []netip.Prefix) error {
	return d.setPeer("add a wireguard peer", wgtypes.PeerConfig{
		PublicKey: wgtypes.Key(key), Endpoint: net.UDPAddrFromAddrPort(endpoint), ReplaceAllowedIPs: true, AllowedIPs: networks(allowed),
	})
}

// SetAllowedIPs replaces what a peer may be sent and may send.
func (d *Device) SetAllowedIPs(key wire.Key, allowed []netip.Prefix) error {
	return d.setPeer("set allowed ips", wgtypes.PeerConfig{
		PublicKey: wgtypes.Key(key), UpdateOnly: true, ReplaceAllowedIPs: true, AllowedIPs: networks(allowed),
	})
}

// RemovePeer removes a peer.
func (d *Device) RemovePeer(key wire.Key) error {
	return d.setPeer("remove a wireguard peer", wgtypes.PeerConfig{PublicKey: wgtypes.Key(key), UpdateOnly: true, Remove: true})
}

// Shake begins a handshake: a peer that is to be kept alive from now on is sent a first packet at once, see set_peer in the kernel's
// drivers/net/wireguard/netlink.c. Keeping it alive is the paths' business.
func (d *Device) Shake(key wire.Key) error {
	for _, interval := range []time.Duration{25 * time.Second, 0} {
		err := d.setPeer("begin a handshake", wgtypes.PeerConfig{
			PublicKey: wgtypes.Key(key), UpdateOnly: true, PersistentKeepaliveInterval: &interval,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Seen reads what the kernel knows of a peer.
func (d *Device) Seen(key wire.Key) (tunnel.Seen, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return tunnel.Seen{}, net.ErrClosed
	}
	state, err := d.client.Device(wgName)
	if err != nil {
		return tunnel.Seen{}, fmt.Errorf("read wireguard's state: %w", err)
	}
	i := slices.IndexFunc(state.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == wgtypes.Key(key) })
	if i < 0 {
		return tunnel.Seen{}, fmt.Errorf("wireguard has no peer %s", key)
	}
	p := state.Peers[i]
	seen := tunnel.Seen{Handshake: p.LastHandshakeTime, RxBytes: uint64(p.ReceiveBytes), TxBytes: uint64(p.TransmitBytes)}
	if p.LastHandshakeTime.Unix() <= 0 {
		seen.Handshake = time.Time{} // the kernel's zero
	}
	return seen, nil
}

func networks(prefixes []netip.Prefix) []net.IPNet {
	list := make([]net.IPNet, len(prefixes))
	for i, p := range prefixes {
		list[i] = net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	}
	return list
}
