package config

import (
	"cmp"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Relay is this node's own relay. It serves on the UDP port, where there is one, and on the HTTPS port.
type Relay struct {
	Off bool `yaml:"-"`
	// Name lists it; default [wire.OwnRelay]. Nodes that share their state need names of their own, and list each other in relays.
	Name string `yaml:"name"`
	// Rate is what it forwards from one side of one session at most, in Mbit/s; default 5000.
	Rate int `yaml:"rate_mbit"`
	// Queue is how much of one session may wait on a WebSocket before packets are dropped, in KiB; default 512.
	Queue int `yaml:"queue_kib"`
	// Sessions is how many it carries at once; default 100000.
	Sessions int `yaml:"sessions"`
}

// BytesPerSecond is the rate in bytes; 0 for the default.
func (r Relay) BytesPerSecond() uint64 { return uint64(r.Rate) * 1e6 / 8 }

// QueueBytes is the queue in bytes; 0 for the default.
func (r Relay) QueueBytes() int { return r.Queue << 10 }

// Bounds on what a relay may be given.
const (
	maxRelayRate     = 1_000_000 // Mbit/s
	minRelayQueue    = 64        // KiB: as much as the kernel hands over at a time
	maxRelayQueue    = 64 << 10
	maxRelaySessions = 10_000_000
)

// relayDoc is another relay as it is written.
type relayDoc struct {
	// Name that clients and gateways show.
	Name string `yaml:"name"`
	// UDP is where it takes datagrams, host:port; without it WebSockets alone.
	UDP string `yaml:"udp"`
	// URL is where it takes WebSockets, such as https://relay.example.com; without it UDP alone.
	URL string `yaml:"url"`
}

// ports are the UDP addresses of STUN and relay and of the second STUN port, "" for none. The second one is by default the
// one after the first: a NAT that maps by destination port shows itself between the two.
func (r *reader) ports(d *document) (udp, probe string) {
	const off = "off"
	if d.UDP == off {
		if d.Probe != "" && d.Probe != off {
			r.fail("$.probe", "a second STUN port without a first", "remove probe, or give udp an address as well")
		}
		return "", ""
	}
	udp = r.addressOrName("$.udp", d.UDP, DefaultUDP)
	switch d.Probe {
	case off:
		return udp, ""
	case "":
		return udp, nextPort(udp)
	}
	probe = r.addressOrName("$.probe", d.Probe, "")
	if probe == udp && !ephemeral(udp) {
		r.fail("$.probe", "probe and udp are the same address", "give probe another port, or remove it for the one after udp's")
	}
	return udp, probe
}

// localName is how a machine's own hosts file may call one of its addresses.
var localName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}(\.[a-z0-9-]{1,63}){0,8}$`)

// addressOrName is [reader.address] that takes a name as well: on Fly.io datagrams come to the address behind fly-global-services alone.
func (r *reader) addressOrName(path, s, otherwise string) string {
	if host, port, err := net.SplitHostPort(s); err == nil && localName.MatchString(host) {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return s
		}
	}
	return r.address(path, s, otherwise)
}

func ephemeral(addr string) bool {
	_, port, _ := net.SplitHostPort(addr)
	return port == "0"
}

// nextPort is addr with the port after its own; one that the system picks stays so, and the last one has none after it.
func nextPort(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	n, perr := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil || perr != nil || n == 1<<16-1:
		return ""
	case n == 0:
		return addr
	}
	return net.JoinHostPort(host, strconv.FormatUint(n+1, 10))
}

func (r *reader) relay(d yamlfile.OrOff[Relay]) Relay {
	own := r.limits("$.relay", "$.relay", d.Value, wire.OwnRelay)
	own.Off = d.Off
	return own
}

// limits checks a relay's name, which stands below one place of the file, and its limits, which stand below another.
func (r *reader) limits(name, limits string, own Relay, otherwise string) Relay {
	own.Name = cmp.Or(own.Name, otherwise)
	if !networkName.MatchString(own.Name) {
		r.fail(name+".name", strconv.Quote(own.Name)+" is no name for a relay", "use up to 63 lower-case letters, digits and inner hyphens")
	}
	r.bounds(limits+".rate_mbit", own.Rate, 1, maxRelayRate)
	r.bounds(limits+".queue_kib", own.Queue, minRelayQueue, maxRelayQueue)
	r.bounds(limits+".sessions", own.Sessions, 1, maxRelaySessions)
	return own
}

// bounds checks a number that may be left out.
func (r *reader) bounds(path string, value, least, most int) {
	if value != 0 && (value < least || value > most) {
		r.fail(path, fmt.Sprintf("%d is not between %d and %d", value, least, most), "choose another number, or leave it out")
	}
}

func (r *reader) relays(docs []relayDoc, insecure bool) []wire.Relay {
	out := make([]wire.Relay, 0, len(docs))
	if len(docs) >= wire.MaxRelays {
		r.fail("$.relays", fmt.Sprintf("more than %d relays", wire.MaxRelays-1), "keep those that are nearest to your runners and gateways")
	}
	for i, d := range docs {
		path := fmt.Sprintf("$.relays[%d]", i)
		switch {
		case !networkName.MatchString(d.Name):
			r.fail(path, strconv.Quote(d.Name)+" is no name for a relay", "use up to 63 lower-case letters, digits and inner hyphens")
		case slices.ContainsFunc(out, func(o wire.Relay) bool { return o.Name == d.Name }):
			r.fail(path+".name", "the relay is listed twice", "keep one of them")
		case d.UDP == "" && d.URL == "":
			r.fail(path, "the relay has no address", "give it udp: HOST:PORT, url: https://HOST/v1/relay, or both")
		}
		out = append(out, wire.Relay{Name: d.Name, UDP: r.relayUDP(path, d.UDP), URL: r.relayURL(path, d.URL, insecure)})
	}
	return out
}

func (r *reader) relayUDP(path, s string) string {
	if s == "" {
		return ""
	}
	host, port, err := net.SplitHostPort(s)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
		r.fail(path+".udp", strconv.Quote(s)+" is not host:port", "write it like relay.example.com:3478")
	}
	return s
}

func (r *reader) relayURL(path, s string, insecure bool) string {
	if s == "" {
		return ""
	}
	u := r.webURL(path+".url", s, insecure)
	if u == nil {
		return ""
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = wire.PathRelay
	}
	return u.String()
}

// ListedRelays are the relays that clients and gateways are told of, this node's own first: udp is where it serves, nil
// where it does not. Where relays lists this node itself, that entry says how it is reached.
func (c *Config) ListedRelays(udp net.Addr) []wire.Relay {
	if c.Relay.Off {
		return c.Relays
	}
	own := wire.Relay{Name: c.Relay.Name, URL: c.URL + wire.PathRelay}
	if a, ok := udp.(*net.UDPAddr); ok {
		own.UDP = ":" + strconv.Itoa(a.Port)
	}
	out := []wire.Relay{own}
	for _, other := range c.Relays {
		if other.Name == own.Name {
			out[0] = other
		} else {
			out = append(out, other)
		}
	}
	return out
}

// ListedSTUN are the STUN servers that they are told of: those of the configuration, else the ports of this node that are open.
func (c *Config) ListedSTUN(open ...net.Addr) []string {
	if len(c.STUN) > 0 {
		return c.STUN
	}
	var out []string
	for _, addr := range open {
		if a, ok := addr.(*net.UDPAddr); ok {
			out = append(out, ":"+strconv.Itoa(a.Port))
		}
	}
	return out
}
