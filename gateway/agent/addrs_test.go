package agent

import (
	"net"
	"net/netip"
	"testing"
)

// TestOwnAddressesOfNetworks: what this machine takes in common with others of its networks is its own, and no other host's.
func TestOwnAddressesOfNetworks(t *testing.T) {
	o := &ownAddrs{list: func() (all []net.Addr, err error) {
		for _, p := range []string{"10.1.2.3/20", "10.9.0.4/31", "10.9.1.7/32", "192.168.7.130/25", "fd00:1::7/64", "fd00:2::2/127", "fd00:3::3/128"} {
			ip, n, err := net.ParseCIDR(p)
			if err != nil {
				return nil, err
			}
			all = append(all, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return all, nil
	}}
	if err := o.refresh(); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{
		"10.1.2.3": true, "10.1.0.0": true, "10.1.15.255": true, "::ffff:10.1.15.255": true, "10.1.2.255": false, "10.1.16.0": false, "10.0.255.255": false,
		"10.9.0.4": true, "10.9.0.5": false, "10.9.1.7": true, "10.9.1.6": false, "10.9.1.255": false,
		"192.168.7.130": true, "192.168.7.128": true, "192.168.7.255": true, "192.168.7.0": false, "192.168.7.127": false,
		"fd00:1::7": true, "fd00:1::": true, "fd00:1::1": false, "fd00:1::ffff:ffff:ffff:ffff": false,
		"fd00:2::2": true, "fd00:2::3": false, "fd00:2::": false, "fd00:3::3": true, "fd00:3::": false,
	} {
		if got := o.has(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is the machine's own: %t, want %t", addr, got, want)
		}
	}
}
