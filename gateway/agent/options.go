package agent

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
)

// Options configure a [Gateway].
type Options struct {
	// Coordinator is the coordinator's public URL, exactly as the audience of every token names it.
	Coordinator string
	// Network is the network that this gateway serves.
	Network string
	// Owners are the numeric repository_owner_id values whose jobs may be admitted. They pin tokens of one issuer alone,
	// because ids of different issuers collide: see [policy.DefaultIssuer].
	Owners []string
	// PolicyFile is the gateway's own policy: what is granted is its intersection with the coordinator's. It is read
	// again when it changes. One of Owners and PolicyFile is required; with both, both must agree.
	PolicyFile string
	// IdentityTokenFile holds a workload identity token. It is read anew for each connection, because it rotates.
	IdentityTokenFile string
	// EnrolTokenFile holds an enrolment secret. Exactly one of the two credentials is required.
	EnrolTokenFile string
	// Listen is the UDP address of the tunnel, ":PORT"; the port 0 picks one. Default ":51820".
	Listen string
	// PublicAddress is where the operator forwards a public address and port to the tunnel's, if anywhere.
	PublicAddress netip.AddrPort
	// PortMapping asks the router on the default route to forward the tunnel's port, unless PublicAddress says that somebody
	// has seen to that.
	PortMapping bool
	// StateDir keeps the WireGuard key over restarts. Without it the key lives in memory.
	StateDir string
	// Issuers whose tokens jobs may bring; default GitHub's.
	Issuers []claims.Issuer
	// InsecureHTTP accepts coordinator and issuers over plain HTTP beyond loopback.
	InsecureHTTP bool
	// Name is the gateway's name in logs and answers; default the host's.
	Name string
	// Resolvers are DNS servers to ask for granted names instead of those that the host's resolv.conf names.
	Resolvers []netip.AddrPort
	// Metrics is the TCP address of the health and metrics page; empty serves none.
	Metrics string
	// Drain is how long sessions are given to move to another gateway or to finish before the gateway stops; 0 stops at once.
	Drain time.Duration
	// Program names this program's version to the coordinator.
	Program string
	Limits  Limits
	Logger  *slog.Logger
	// HTTPClient reaches the coordinator, the issuers and relays; default: one that goes through the environment's proxies.
	HTTPClient *http.Client
}

// Limits bound what a coordinator and the jobs may ask of a gateway.
type Limits struct {
	Sessions   int           // sessions held at once; default 20000
	Offers     int           // offers and renewals that are being verified at once; default 256
	OfferRate  int           // offers a second, with a burst of four times as many; default 500
	MaxSession time.Duration // longest session whatever anybody grants; default 120 h, the longest self-hosted job
	Forward    forward.Limits
}

// Bounds on a lease, whatever the coordinator offers: shorter ones would melt the renewal path, longer ones would keep a
// dead job's session for too long.
const (
	minLease     = time.Second
	maxLease     = time.Hour
	defaultLease = 10 * time.Minute
)

// Validate checks the options and fills defaults. The error is a *problem.Error.
func (o *Options) Validate() error {
	o.Logger = cmp.Or(o.Logger, slog.Default())
	o.Listen = cmp.Or(o.Listen, ":51820")
	o.Program = cmp.Or(o.Program, "culvert-gateway")
	if len(o.Issuers) == 0 {
		o.Issuers = []claims.Issuer{{URL: claims.GitHub}}
	}
	if o.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return problem.Wrap(err, problem.BadConfig, "the host's name cannot be read", "name the gateway with --name")
		}
		o.Name = name
	}
	o.Limits.fill()
	for _, check := range []func() error{o.Limits.check, o.checkCoordinator, o.checkPins, o.checkCredential, o.checkAddresses} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (l *Limits) fill() {
	l.Sessions = cmp.Or(l.Sessions, 20000)
	l.Offers = cmp.Or(l.Offers, 256)
	l.OfferRate = cmp.Or(l.OfferRate, 500)
	l.MaxSession = cmp.Or(l.MaxSession, 120*time.Hour)
	l.Forward.TotalFlows = cmp.Or(l.Forward.TotalFlows, flowsWithin(tunnel.Descriptors()))
}

// flowsWithin is how many flows a process opens that may have so many file descriptors: half of them, so that no job takes what the control
// stream, lookups and relays need. A quarter more is for what gets through hard NATs.
func flowsWithin(descriptors int) int { return min(forward.DefaultTotalFlows, descriptors/2) }

func warnOfFewFlows(log *slog.Logger, most int) {
	if most < forward.DefaultTotalFlows {
		log.Warn("few flows may be open at once: this process may have few files", "flows", most, "usual", forward.DefaultTotalFlows,
			"next", fmt.Sprintf("allow it %d open files (LimitNOFILE, ulimit -n)", 2*forward.DefaultTotalFlows))
	}
}

func (l *Limits) check() error {
	if min(l.Sessions, l.Offers, l.OfferRate) < 0 || l.MaxSession < 0 {
		return problem.New(problem.BadConfig, "a limit is negative", "give --max-sessions a positive number")
	}
	return nil
}

func (o *Options) checkCoordinator() error {
	bad := func(message string) error {
		return problem.New(problem.BadConfig, message,
			"give the coordinator's public URL, for example --coordinator https://culvert.example.com")
	}
	u, err := url.Parse(o.Coordinator)
	switch {
	case o.Coordinator == "":
		return bad("no coordinator is named")
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return bad("the coordinator's URL is not one of the form https://host")
	case u.Scheme != "https" && u.Scheme != "http":
		return bad(fmt.Sprintf("the coordinator's URL has the scheme %q", u.Scheme))
	case u.Scheme == "http" && !o.InsecureHTTP && !loopbackHost(u.Hostname()):
		return problem.New(problem.BadConfig, "the coordinator's URL is plain HTTP, which anybody on the way can read and change",
			"use https, or accept the risk with --insecure-http")
	case o.Network == "":
		return problem.New(problem.BadConfig, "no network is named",
			"give the network's name in the coordinator's file, for example --network corp")
	}
	o.Coordinator = strings.TrimRight(o.Coordinator, "/")
	return nil
}

func (o *Options) checkPins() error {
	if len(o.Owners) == 0 && o.PolicyFile == "" {
		return problem.New(problem.BadConfig,
			"the gateway is not told whose jobs it may admit, and it does not leave that to the coordinator",
			"pin your organisation with --owner ID (gh api orgs/NAME --jq .id), or give rules of its own with --policy FILE")
	}
	issuers := make([]string, len(o.Issuers))
	for i := range o.Issuers {
		issuers[i] = o.Issuers[i].URL
	}
	if _, ok := policy.DefaultIssuer(issuers); !ok && len(o.Owners) > 0 {
		return problem.New(problem.BadConfig, "--owner does not say whose owner it means: there are several issuers, and none is github.com's",
			"give rules that name their issuer with --policy FILE instead")
	}
	for _, id := range o.Owners {
		if n, err := strconv.ParseUint(id, 10, 64); err != nil || n == 0 || strconv.FormatUint(n, 10) != id {
			return problem.New(problem.BadConfig, fmt.Sprintf("the owner %q is no numeric id, and names get recycled", id),
				"look the id up: gh api users/NAME --jq .id")
		}
	}
	return nil
}

func (o *Options) checkCredential() error {
	if (o.IdentityTokenFile == "") == (o.EnrolTokenFile == "") {
		return problem.New(problem.BadConfig, "the gateway needs exactly one credential for the coordinator",
			"give --identity-token-file FILE, or --enrol-token-file FILE")
	}
	_, err := o.credential()
	return err
}

func (o *Options) checkAddresses() error {
	if _, err := o.port(); err != nil {
		return err
	}
	p := o.PublicAddress
	if p != (netip.AddrPort{}) && (!p.IsValid() || p.Port() == 0 || !saneUnicast(p.Addr())) {
		return problem.New(problem.BadConfig, fmt.Sprintf("the public address %s cannot be reached by anybody", p),
			"give --public-address as IP:PORT")
	}
	return nil
}

// port is the UDP port of Listen. The tunnel takes packets on all addresses, so that a candidate on any of them works.
func (o *Options) port() (uint16, error) {
	host, port, err := net.SplitHostPort(o.Listen)
	n, perr := strconv.ParseUint(port, 10, 16)
	addr, _ := netip.ParseAddr(host)
	if err != nil || perr != nil || (host != "" && !addr.IsUnspecified()) {
		return 0, problem.New(problem.BadConfig, fmt.Sprintf("the listen address %q is not a port on all addresses", o.Listen),
			"give --listen as :PORT, for example :51820")
	}
	return uint16(n), nil
}

// stunFallback is the host that a STUN server without one means: the coordinator's.
func (o *Options) stunFallback() string {
	u, err := url.Parse(o.Coordinator)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

func loopbackHost(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || (err == nil && addr.IsLoopback())
}

// client is what reaches the coordinator, the issuers and relays. It has no timeout of its own, which would end streams too.
func (o *Options) client() *http.Client {
	if o.HTTPClient != nil {
		return o.HTTPClient
	}
	return &http.Client{Transport: egress.New(http.DefaultTransport.(*http.Transport))}
}
