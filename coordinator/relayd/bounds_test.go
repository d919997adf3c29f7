package relayd

import (
	"net"
	"net/netip"
	"testing"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/limit"
)

// TestConnectionsAreBounded: what a stranger opens is counted, in all and for its address, before a byte of it is read.
func TestConnectionsAreBounded(t *testing.T) {
	r := newRig(t, plain, 0)
	c, err := net.Dial("tcp", r.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is counted", func() bool { return r.web.listener.Open() == 1 })
	_ = c.Close()
	eventually(t, "it is counted out", func() bool { return r.web.listener.Open() == 0 })
}

func TestBounds(t *testing.T) {
	proxies := []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}
	for _, tc := range []struct{ websockets, open, each int }{
		{0, limit.DefaultConns, 5000}, {100, limit.DefaultConns, limit.DefaultAddrConns}, {200_000, 300_000, 50_000},
	} {
		got := bounds(&config.Standalone{WebSockets: tc.websockets, TrustedProxies: proxies})
		if got.Open != tc.open || got.OpenAddr != tc.each || got.Rate != 0 || len(got.Trusted) != 1 {
			t.Errorf("%d WebSockets: %+v", tc.websockets, got)
		}
	}
}
