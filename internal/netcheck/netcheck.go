// Package netcheck finds out what the network around this host is, and what that means for a tunnel: whether UDP gets out, what the
// NAT does, which relays can be reached and how fast, and how large packets may be.
//
// It asks nobody but the coordinator and what that names: STUN servers and relays.
package netcheck

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	stunPort = 3478 // RFC 8489, section 7; the next one is the coordinator's second
	maxSTUN  = 8    // servers asked, of those that the coordinator names

	httpTimeout = 10 * time.Second // for one request, or one WebSocket
	udpTimeout  = 3 * time.Second  // for STUN servers to answer: a silent one takes all of it
)

// Options configure a check.
type Options struct {
	// Coordinator is the coordinator's URL.
	Coordinator string
	// InsecureHTTP accepts plain HTTP beyond loopback.
	InsecureHTTP bool
	// Skip leaves interfaces out by name; default [nat.SkipVirtual].
	Skip func(iface string) bool
	// Transport does the requests; default one that goes through the environment's proxies.
	Transport *egress.Transport
	// UDPTimeout is how long answers over UDP are waited for; default 3 s. It is spent whole where there are none, and where a NAT
	// lets nothing in that it was not asked for.
	UDPTimeout time.Duration
	Logger     *slog.Logger

	url *url.URL
}

// Validate checks the options and fills defaults. The error is a *problem.Error.
func (o *Options) Validate() error {
	u, err := ParseURL(o.Coordinator, o.InsecureHTTP)
	if err != nil {
		return err
	}
	o.url = u
	if o.Skip == nil {
		o.Skip = nat.SkipVirtual
	}
	if o.Transport == nil {
		o.Transport = NewTransport()
	}
	o.UDPTimeout = cmp.Or(o.UDPTimeout, udpTimeout)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// ParseURL reads a coordinator's URL. Plain HTTP is for loopback alone unless insecure says otherwise. The error is a
// *problem.Error.
func ParseURL(coordinator string, insecure bool) (*url.URL, error) {
	u, err := url.Parse(coordinator)
	switch {
	case coordinator == "":
		return nil, problem.New(problem.Usage, "no coordinator is named", "give --coordinator (or CULVERT_COORDINATOR)")
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, problem.New(problem.Usage, "the coordinator's URL is not one of the form https://host", "correct --coordinator")
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, problem.New(problem.Usage, fmt.Sprintf("the coordinator's URL has the scheme %q", u.Scheme), "use https")
	case u.Scheme == "http" && !insecure && !loopback(u.Hostname()):
		return nil, problem.New(problem.Usage, "the coordinator's URL is plain http, which anybody on the way can read and change",
			"use https, or say --insecure-http if you mean it")
	}
	u.Path = strings.TrimRight(u.Path, "/")
	return u, nil
}

// NewTransport makes the transport that checks use by default.
func NewTransport() *egress.Transport {
	return egress.New(&http.Transport{
		DialContext:         (&net.Dialer{Timeout: httpTimeout}).DialContext,
		TLSHandshakeTimeout: httpTimeout, ResponseHeaderTimeout: httpTimeout, ForceAttemptHTTP2: true,
	})
}

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// checker is one check.
type checker struct {
	Options
	report  *Report
	network nat.Network
	info    wire.Info
}

// Run checks the network. What fails is part of the report; the error tells that the options are wrong or that ctx ended. It
// takes up to 20 s where nothing answers, and a second where everything does.
func Run(ctx context.Context, opts Options) (*Report, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	defer opts.Transport.CloseIdleConnections()
	c := &checker{Options: opts, report: &Report{Relays: []Relay{}, UDP: UDP{Servers: []STUNServer{}}}}
	c.local()
	c.https(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { c.udp(ctx) })
	wg.Go(func() { c.webSockets(ctx) })
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, problem.Wrap(context.Cause(ctx), problem.Cancelled, "the check was interrupted", "")
	}
	c.report.Tunnel = judge(c.report)
	return c.report, nil
}

// local notes what this host itself knows.
func (c *checker) local() {
	network, err := nat.ReadNetwork(c.Skip)
	if err != nil {
		c.Logger.Warn("this host's addresses cannot be read", "err", err)
	}
	c.network = network
	c.report.IPv4.Addresses, c.report.IPv6.Addresses = []netip.Addr{}, []netip.Addr{}
	for _, a := range network.Addrs {
		if a.Is4() {
			c.report.IPv4.Addresses = append(c.report.IPv4.Addresses, a)
		} else {
			c.report.IPv6.Addresses = append(c.report.IPv6.Addresses, a)
		}
	}
}

// servers gives the STUN servers to ask: those that the coordinator names, and where it does not answer, its own at the usual
// ports.
func (c *checker) servers() []string {
	if !c.report.Coordinator.Reachable {
		return []string{":" + strconv.Itoa(stunPort), ":" + strconv.Itoa(stunPort+1)}
	}
	return c.info.STUN
}

// Lookup gives at most one address of each family for "host:port"; an empty host is the coordinator's.
func Lookup(ctx context.Context, coordinator, server string) ([]netip.AddrPort, error) {
	host, text, err := net.SplitHostPort(server)
	if err != nil {
		return nil, fmt.Errorf("%.100q is not host:port", server)
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return nil, fmt.Errorf("%.100q is not host:port", server)
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", cmp.Or(host, coordinator))
	if err != nil {
		return nil, err
	}
	var out []netip.AddrPort
	for _, a := range addrs {
		a = a.Unmap()
		if !slices.ContainsFunc(out, func(o netip.AddrPort) bool { return o.Addr().Is4() == a.Is4() }) {
			out = append(out, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	if len(out) == 0 {
		return nil, errors.New("the name has no address")
	}
	return out, nil
}
