package agent

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/egress"
)

// outside remembers every address that the agent itself has talked to without the tunnel: coordinator, issuer, STUN,
// or the proxy on the way there. Routes leave them out, so that a grant which covers them, `internet` say, does not cut the
// branch that the tunnel sits on.
type outside struct {
	onNew  func(netip.Addr)
	dialer egress.Dialer

	mu    sync.Mutex
	addrs map[netip.Addr]struct{}
}

func newOutside() *outside {
	return &outside{onNew: func(netip.Addr) {}, addrs: map[netip.Addr]struct{}{}}
}

// add remembers an address, and has routes make room for it before it is used.
func (o *outside) add(addr netip.Addr) {
	addr = addr.Unmap().WithZone("")
	o.mu.Lock()
	_, known := o.addrs[addr]
	o.addrs[addr] = struct{}{}
	o.mu.Unlock()
	if !known {
		o.onNew(addr)
	}
}

// list gives all addresses.
func (o *outside) list() []netip.Addr {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := make([]netip.Addr, 0, len(o.addrs))
	for addr := range o.addrs {
		list = append(list, addr)
	}
	return list
}

// client makes the HTTP client for everything outside. It goes through the environment's proxies, and follows no redirect:
// requests carry tokens.
func (o *outside) client() *http.Client {
	o.dialer.Dialer = net.Dialer{
		Timeout: 10 * time.Second,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			if addr, err := netip.ParseAddrPort(address); err == nil {
				o.add(addr.Addr())
			}
			return nil
		},
	}
	transport := egress.New(&http.Transport{
		DialContext:           o.dialer.DialContext,
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(8)},
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConnsPerHost:   4,
	})
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
