package portmap

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"
)

const (
	ssdpPort     = 1900
	maxSSDP      = 2048 // bytes of an answer
	maxLocations = 4    // places that one router may send us to
)

var ssdpGroup = netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 255, 255, 250}), ssdpPort)

// searched are the devices that map ports (UPnP Device Architecture 1.1, section 1.3.2).
var searched = []string{
	"urn:schemas-upnp-org:device:InternetGatewayDevice:1",
	"urn:schemas-upnp-org:device:InternetGatewayDevice:2",
}

func encodeSearch(target string) []byte {
	return fmt.Appendf(nil, "M-SEARCH * HTTP/1.1\r\nHOST: %s\r\nST: %s\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\n\r\n", ssdpGroup, target)
}

// readLocation reads the answer to a search: where the router describes itself. Only an answer of the router itself counts,
// and only if it names its own address: whatever else it names, we would be its tool for reaching it.
func readLocation(b []byte, from, router netip.Addr) (*url.URL, error) {
	if from.Unmap() != router {
		return nil, fmt.Errorf("%s is not the router", from)
	}
	if len(b) > maxSSDP {
		return nil, errors.New("the answer to a search is too large")
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
	if err != nil {
		return nil, fmt.Errorf("read the answer to a search: %w", err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !strings.Contains(resp.Header.Get("ST"), ":InternetGatewayDevice:") {
		return nil, errors.New("not an answer to this search")
	}
	location, err := url.Parse(resp.Header.Get("LOCATION"))
	if err != nil {
		return nil, fmt.Errorf("read the description's location: %w", err)
	}
	return location, onRouter(location, router)
}

// onRouter refuses a URL that is not plain HTTP to the router's own address, written as such.
func onRouter(u *url.URL, router netip.Addr) error {
	addr, err := netip.ParseAddr(u.Hostname())
	if u.Scheme != "http" || err != nil || addr != router || u.User != nil {
		return fmt.Errorf("the router sends us to %.100q, which is not its own address", u.Redacted())
	}
	return nil
}

// search asks for routers, both the group and the router itself, since networks filter either, and gives the locations that
// it names, until ctx ends or found says that it has what it wants.
func search(ctx context.Context, router, self netip.Addr, found func(*url.URL) bool) error {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(self, 0)))
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	seen := map[string]bool{}
	buf := make([]byte, maxSSDP+1)
	for wait := patience; ctx.Err() == nil; wait *= 2 {
		for _, target := range searched {
			for _, to := range []netip.AddrPort{ssdpGroup, netip.AddrPortFrom(router, ssdpPort)} {
				_, _ = conn.WriteToUDPAddrPort(encodeSearch(target), to) // one of the two may have no route
			}
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return fmt.Errorf("set a deadline: %w", err)
		}
		for ctx.Err() == nil {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("hear the router: %w", err)
			}
			location, err := readLocation(buf[:n], from.Addr(), router)
			if err != nil || seen[location.String()] || len(seen) >= maxLocations {
				continue
			}
			seen[location.String()] = true
			if found(location) {
				return nil
			}
		}
	}
	return fmt.Errorf("no router answers: %w", context.Cause(ctx))
}
