package names

import (
	"bufio"
	"bytes"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// Where the system's servers are written down. The first one is systemd-resolved's list of the servers behind its stub.
var resolverFiles = []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"}

const (
	maxResolverFile = 64 << 10 // bytes that are read of it
	rereadAfter     = 2 * time.Second
)

// systemServers gives the system's DNS servers, read anew when they may have changed.
func systemServers(files []string) func() []netip.AddrPort {
	var (
		mu      sync.Mutex
		read    time.Time
		servers []netip.AddrPort
	)
	return func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(read) < rereadAfter {
			return servers
		}
		read = time.Now()
		for _, name := range files {
			if data, err := readBounded(name); err == nil {
				if servers = parseResolver(data); len(servers) > 0 {
					break
				}
			}
		}
		return servers
	}
}

// SystemServers are the DNS servers that this host asks, loopback ones left out: no route leads to those.
func SystemServers() []netip.Addr {
	var addrs []netip.Addr
	for _, server := range systemServers(resolverFiles)() {
		if !server.Addr().IsLoopback() {
			addrs = append(addrs, server.Addr().Unmap().WithZone(""))
		}
	}
	return addrs
}

func readBounded(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxResolverFile))
}

// parseResolver reads the nameserver lines of resolv.conf(5).
func parseResolver(data []byte) []netip.AddrPort {
	var all []netip.AddrPort
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			all = append(all, netip.AddrPortFrom(addr, 53))
		}
	}
	return all
}
