//go:build unix

package stage

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/wire"
)

// RelayOptions describe a relay that runs alone.
type RelayOptions struct {
	Name  string
	Link  lab.Link
	NoUDP bool // WebSockets alone
}

// Relay is a relay that runs alone.
type Relay struct {
	Host    *lab.Host
	opts    RelayOptions
	process *lab.Process
}

// relayHosts makes the hosts that relays run on.
func (s *Stage) relayHosts() error {
	for _, opts := range s.opts.Relays {
		host, err := s.Net.Host("relay-"+opts.Name, lab.HostOptions{Link: opts.Link})
		if err != nil {
			return err
		}
		s.Relays = append(s.Relays, &Relay{Host: host, opts: opts})
	}
	return nil
}

// listRelays is what the coordinator's file says of them.
func (s *Stage) listRelays() []string {
	var relays, stun []string
	for _, r := range s.Relays {
		entry := fmt.Sprintf("{name: %s, url: \"https://%s%s\"", r.opts.Name, r.Host.Addr(), wire.PathRelay)
		if !r.opts.NoUDP {
			at := netip.AddrPortFrom(r.Host.Addr(), PortSTUN).String()
			entry, stun = entry+fmt.Sprintf(", udp: %q", at), append(stun, fmt.Sprintf("%q", at))
		}
		relays = append(relays, entry+"}")
	}
	if len(relays) == 0 {
		return nil
	}
	lines := []string{"relays: [" + strings.Join(relays, ", ") + "]"}
	if s.opts.NoUDP {
		lines = append(lines, "stun: ["+strings.Join(stun, ", ")+"]")
	}
	return lines
}
