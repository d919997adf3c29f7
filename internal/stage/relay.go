//go:build unix

package stage

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/wire"
)

// RelayOptions describe a relay that runs alone.
type RelayOptions struct {
	Name  string
	Link  lab.Link
	NoUDP bool // WebSockets alone
	// TicketKeys are public keys of coordinators besides the stage's, as relay.yaml takes them.
	TicketKeys []string
}

// Relay is a relay that runs alone.
type Relay struct {
	Host    *lab.Host
	stage   *Stage
	opts    RelayOptions
	process *lab.Process
}

// Process is the relay's.
func (r *Relay) Process() *lab.Process { return r.process }

// Name is what the coordinator calls it.
func (r *Relay) Name() string { return r.opts.Name }

// STUN is where it serves STUN and relay over UDP.
func (r *Relay) STUN() netip.AddrPort { return netip.AddrPortFrom(r.Host.Addr(), PortSTUN) }

// Kill kills it with -9 and waits.
func (r *Relay) Kill() { kill(r.process) }

// Start starts it, and returns when it takes connections. The coordinator has to run: its key is asked for.
func (r *Relay) Start(ctx context.Context) error {
	if err := r.start(ctx); err != nil {
		return fmt.Errorf("start relay %s: %w\n%s", r.opts.Name, err, r.stage.Logs())
	}
	return nil
}

func (r *Relay) start(ctx context.Context) error {
	s, name := r.stage, "relay-"+r.opts.Name
	var info wire.Info
	if err := s.callFrom(ctx, s.Cloud, http.MethodGet, wire.PathInfo, "", nil, &info); err != nil {
		return err
	}
	keys := append([]string{info.TicketKey}, r.opts.TicketKeys...)
	udp := strconv.Quote(r.STUN().String())
	if r.opts.NoUDP {
		udp = "off"
	}
	listen := netip.AddrPortFrom(r.Host.Addr(), 443).String()
	config := fmt.Sprintf("name: %s\nticket_keys: [%s]\nudp: %s\nlisten: %q\ntls: {cert: %q, key: %q}\n",
		r.opts.Name, strings.Join(keys, ", "), udp, listen, s.ca.certFile(), s.ca.keyFile())
	if err := os.WriteFile(s.file(name+".yaml"), []byte(config), 0o644); err != nil {
		return err
	}
	proc, err := s.daemon(r.Host, name, lab.Program{
		Path: s.Binary("culvert-coordinator"), Args: []string{"relay", "--config", s.file(name + ".yaml")}, Env: s.environ(r.Host),
	})
	if err != nil {
		return err
	}
	r.process = proc
	return poll(ctx, proc.Done(), func() error {
		conn, err := r.Host.Dial(ctx, "tcp", listen)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// relayHosts makes the hosts that relays run on.
func (s *Stage) relayHosts() error {
	for _, opts := range s.opts.Relays {
		host, err := s.Net.Host("relay-"+opts.Name, lab.HostOptions{Link: opts.Link})
		if err != nil {
			return err
		}
		s.Relays = append(s.Relays, &Relay{Host: host, stage: s, opts: opts})
	}
	return nil
}

// listRelays is what the coordinator's file says of them.
func (s *Stage) listRelays() []string {
	var relays, stun []string
	for _, r := range s.Relays {
		entry := fmt.Sprintf("{name: %s, url: \"https://%s%s\"", r.opts.Name, r.Host.Addr(), wire.PathRelay)
		if !r.opts.NoUDP {
			at := strconv.Quote(r.STUN().String())
			entry, stun = entry+", udp: "+at, append(stun, at)
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

// startRelays starts those that run alone.
func (s *Stage) startRelays(ctx context.Context) error {
	for _, r := range s.Relays {
		if err := r.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}
