package names

import (
	"bufio"
	"bytes"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	fileEvery  = 5 * time.Second // how soon a changed file is noticed
	maxFile    = 1 << 20         // bytes of a file that are read
	maxServers = 8
	maxSearch  = 6
)

// watched is a file that is read again when it has changed. It is looked at no more often than fileEvery.
type watched struct {
	path string

	mu      sync.Mutex
	looked  time.Time
	changed time.Time
	size    int64
}

// read gives the file's content if it is to be taken in anew, nil if not. mu is held.
func (w *watched) read(now time.Time) []byte {
	if !w.looked.IsZero() && now.Sub(w.looked) < fileEvery {
		return nil
	}
	first := w.looked.IsZero()
	w.looked = now
	info, err := os.Stat(w.path)
	if err != nil || !first && info.ModTime().Equal(w.changed) && info.Size() == w.size {
		return nil
	}
	f, err := os.Open(w.path)
	if err != nil {
		return nil
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil
	}
	w.changed, w.size = info.ModTime(), info.Size()
	return data
}

// hostsFile is the host's static table of names (hosts(5)).
type hostsFile struct {
	watched
	names map[string][]netip.Addr
}

func newHostsFile(path string) *hostsFile { return &hostsFile{watched: watched{path: path}} }

// lookup gives the addresses of a canonical name, IPv6 first.
func (h *hostsFile) lookup(name string) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	if data := h.read(time.Now()); data != nil {
		h.names = parseHosts(data)
	}
	return h.names[name]
}

func parseHosts(data []byte) map[string][]netip.Addr {
	names := map[string][]netip.Addr{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil || addr.Zone() != "" {
			continue
		}
		for _, field := range fields[1:] {
			if name, ok := canonical(field); ok && len(names[name]) < maxAddrs {
				names[name] = append(names[name], addr.Unmap())
			}
		}
	}
	for _, addrs := range names {
		slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return b.BitLen() - a.BitLen() })
	}
	return names
}

// conf is what a resolver takes from resolv.conf(5).
type conf struct {
	servers []netip.AddrPort
	search  []string // canonical
}

// confFile is the host's resolv.conf.
type confFile struct {
	watched
	conf conf
}

func newConfFile(path string) *confFile {
	return &confFile{watched: watched{path: path}, conf: parseConf(nil)}
}

func (c *confFile) get() conf {
	c.mu.Lock()
	defer c.mu.Unlock()
	if data := c.read(time.Now()); data != nil {
		c.conf = parseConf(data)
	}
	return c.conf
}

// parseConf reads a resolv.conf. Without a server in it, the one on this host is meant, as for the system's own resolver.
func parseConf(data []byte) conf {
	var out conf
	if parsed, err := dns.ClientConfigFromReader(bytes.NewReader(data)); err == nil {
		for _, server := range parsed.Servers {
			if addr, err := netip.ParseAddr(server); err == nil && len(out.servers) < maxServers {
				out.servers = append(out.servers, netip.AddrPortFrom(addr, 53))
			}
		}
		for _, suffix := range parsed.Search {
			if name, ok := canonical(suffix); ok && len(out.search) < maxSearch {
				out.search = append(out.search, name)
			}
		}
	}
	if len(out.servers) == 0 {
		out.servers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53"), netip.MustParseAddrPort("[::1]:53")}
	}
	return out
}
