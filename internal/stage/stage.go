//go:build unix

// Package stage sets up a whole Culvert on a network lab, for the end-to-end tests and the demo: an issuer that behaves
// like GitHub's, the coordinator, a gateway in front of a private service, and jobs. The programs are the real ones.
//
//	runner ── NAT ──┐                    ┌── NAT ── gateway
//	                ├── (the internet) ──┤      └── service
//	issuer ─────────┘                    └───────── coordinator
package stage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/podman"
)

// Network is the name of the private network.
const Network = "corp"

// The organisation and the repository that the default rule names.
const (
	OwnerID    = "9919"
	Repository = "acme/shop"
)

// Ports of the service host. Only the first two are in the default grant.
const (
	PortHTTP  = 80
	PortEcho  = 7
	PortOther = 81
)

// PortSTUN is where coordinator and relays serve STUN and relay over UDP.
const PortSTUN = 3478

// Options describe a stage. Binaries and Dir are required.
type Options struct {
	Binaries string // folder with the three programs, see [Build]
	// Programs are paths of programs that are not those of Binaries, by name: another version's.
	Programs map[string]string
	Dir      string // scratch folder that other users can enter; the caller removes it
	Flat     bool   // everything on this machine itself, nothing kept apart; see [lab.Flat]
	Link     lab.Link
	// Middle puts the coordinator, and with it its relay, in the middle of the internet: without Link of its own, so that the way
	// through it is no longer than the direct one.
	Middle bool
	// Runner and Gateway are what stands in front of them; default [lab.Easy]. Behind [lab.OnlyProxy] there is a proxy that wants
	// a password, and the programs are told of it; it needs tinyproxy.
	Runner  lab.NATOptions
	Gateway lab.NATOptions
	// NoUDP runs the coordinator as on a platform without UDP; STUN is then the relays' business.
	NoUDP bool
	// Relays run alone, each on a host of its own.
	Relays []RelayOptions
	// Other is the name of another network, if there is one: its gateway is on the first one's host, and is started with it.
	Other string
	// Rules gives the coordinator's rules as YAML, a list; the default grants the service's HTTP and echo ports to
	// pushes to main of [Repository].
	Rules func(*Stage) string
	// Drain is how long a gateway that is asked to stop waits for its sessions; default not at all.
	Drain time.Duration
	// Policy gives the gateway's own policy file; by default it pins [OwnerID] instead.
	Policy func(*Stage) string
	// Coordinator is further top-level YAML for the coordinator.
	Coordinator string
	// Service handles the service's HTTP ports.
	Service http.Handler
	// Images runs the gateway from its image, see [BuildImages]; the coordinator too, where CoordinatorImage says so.
	Images           *podman.Engine
	CoordinatorImage bool
	// Names are what the private network's DNS knows, and the gateway asks. All lead to the service's host.
	Names []string
}

// Stage is a running Culvert.
type Stage struct {
	opts Options

	Net        *lab.Net
	Cloud      *lab.Host // the coordinator's
	IssuerHost *lab.Host
	Runner     *lab.Host
	GatewayBox *lab.Host
	Private    *lab.Host   // the service's
	NATs       [2]*lab.NAT // the runner's and the gateway's; nil on a flat stage
	Relays     []*Relay
	Issuer     *claimstest.Issuer
	URL        string // the coordinator's

	binaries    map[string]string // name → path that every user can run
	ports       ports
	proxies     map[*lab.Host]*url.URL // of hosts that have no other way out
	ca          *authority
	enrolment   string
	coordinator *lab.Process
	gateway     *lab.Process
	second      *lab.Process // nil unless a test starts it
	other       *lab.Process // of Options.Other

	mu      sync.Mutex
	closers []func()
	jobs    int
}

// New builds the network, the issuer and the private service. No program runs yet: see [Stage.StartCoordinator] and
// [Stage.StartGateway], or [Stage.Start] for both.
func New(ctx context.Context, opts Options) (*Stage, error) {
	s := &Stage{opts: opts}
	if err := s.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("set the stage: %w", err), s.Close())
	}
	return s, nil
}

func (s *Stage) build(ctx context.Context) error {
	if err := s.publishBinaries(); err != nil {
		return err
	}
	if err := s.buildNetwork(ctx); err != nil {
		return err
	}
	if err := s.choosePorts(); err != nil {
		return err
	}
	var err error
	servers := []netip.Addr{s.Cloud.Addr(), s.IssuerHost.Addr()}
	for _, r := range s.Relays {
		servers = append(servers, r.Host.Addr())
	}
	if s.ca, err = newAuthority(s.opts.Dir, servers...); err != nil {
		return err
	}
	if err := s.startIssuer(); err != nil {
		return err
	}
	if err := s.startService(); err != nil {
		return err
	}
	if err := s.startProxies(ctx); err != nil {
		return err
	}
	s.URL = s.scheme() + "://" + s.at(s.Cloud, s.ports.coordinator, 443)
	return s.writeFiles()
}

func (s *Stage) buildNetwork(ctx context.Context) (err error) {
	if s.opts.Flat {
		s.Net = lab.Flat(ctx)
		return s.hosts(nil, nil)
	}
	if s.Net, err = lab.New(ctx); err != nil {
		return err
	}
	s.opts.Runner.Link = cmp.Or(s.opts.Runner.Link, s.opts.Link)
	s.opts.Gateway.Link = cmp.Or(s.opts.Gateway.Link, s.opts.Link)
	runner, err := s.Net.NAT("nat-runner", s.opts.Runner)
	if err != nil {
		return err
	}
	gateway, err := s.Net.NAT("nat-gateway", s.opts.Gateway)
	if err != nil {
		return err
	}
	s.NATs = [2]*lab.NAT{runner, gateway}
	if err := s.relayHosts(); err != nil {
		return err
	}
	return s.hosts(runner, gateway)
}

func (s *Stage) hosts(runner, gateway *lab.NAT) error {
	open := lab.HostOptions{Link: s.opts.Link}
	cloud := open
	if s.opts.Middle {
		cloud.Link = lab.Link{}
	}
	for _, h := range []struct {
		host **lab.Host
		name string
		opts lab.HostOptions
	}{
		{&s.Cloud, "coordinator", cloud},
		{&s.IssuerHost, "issuer", open},
		{&s.Runner, "runner", lab.HostOptions{Behind: runner}},
		{&s.GatewayBox, "gateway", lab.HostOptions{Behind: gateway}},
		{&s.Private, "service", lab.HostOptions{Behind: gateway, Flat: lab.MachineAddr()}},
	} {
		var err error
		if *h.host, err = s.Net.Host(h.name, h.opts); err != nil {
			return err
		}
	}
	return nil
}

// HasOther reports whether there is another network.
func (s *Stage) HasOther() bool { return s.opts.Other != "" }

// Start starts coordinator, relays and gateway and returns when the gateway takes sessions.
func (s *Stage) Start(ctx context.Context) error {
	if err := s.StartCoordinator(ctx); err != nil {
		return err
	}
	if err := s.startRelays(ctx); err != nil {
		return err
	}
	return s.StartGateway(ctx)
}

// Close ends everything and waits. It is idempotent.
func (s *Stage) Close() error {
	s.mu.Lock()
	closers := s.closers
	s.closers = nil
	s.mu.Unlock()
	for i := len(closers) - 1; i >= 0; i-- {
		closers[i]()
	}
	if s.Net == nil {
		return nil
	}
	return s.Net.Close()
}

func (s *Stage) onClose(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closers = append(s.closers, f)
}

// Target is "IP:port" of the private service.
func (s *Stage) Target(port uint16) string {
	return netip.AddrPortFrom(s.Private.Addr(), s.port(port)).String()
}

// DefaultRules is what the coordinator is told where Options say nothing.
func (s *Stage) DefaultRules() string {
	return fmt.Sprintf(`- name: deploy
  network: %s
  match: {repository_owner_id: %q, repository: %s, ref: refs/heads/main}
  allow: [%q, %q]
`, Network, OwnerID, Repository, "tcp "+s.Target(PortHTTP), "udp "+s.Target(PortEcho))
}

// Logs gives what the stage's programs have written so far, for a failed test.
func (s *Stage) Logs() string {
	files, err := filepath.Glob(filepath.Join(s.opts.Dir, "*.log"))
	if err != nil {
		return ""
	}
	var all strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && len(data) > 0 {
			fmt.Fprintf(&all, "--- %s\n%s\n", filepath.Base(f), data)
		}
	}
	return all.String()
}

// poll calls try every few milliseconds until it succeeds, ctx ends, or dead is closed.
func poll(ctx context.Context, dead <-chan struct{}, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-dead:
			return errors.Join(err, errors.New("the program has ended"))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
