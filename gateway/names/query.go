package names

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/internal/policy"
)

// query asks the servers, following aliases that they do not follow themselves. It also says how long to keep the outcome.
func (r *Resolver) query(ctx context.Context, q question) (a Answer, keep time.Duration, err error) {
	names := []string{q.name}
	if !strings.Contains(q.name, ".") {
		for _, suffix := range r.conf.get().search {
			names = append(names, q.name+"."+suffix)
		}
	}
	for _, name := range names {
		if a, keep, err = r.follow(ctx, question{name, q.qtype}); err == nil {
			break
		}
	}
	return a, keep, err
}

func (r *Resolver) follow(ctx context.Context, q question) (a Answer, keep time.Duration, err error) {
	keep = maxTTL
	for range maxChain {
		m, err := r.exchange(ctx, q)
		if err != nil {
			return Answer{}, failureTTL, err
		}
		found, alias, ttl := read(m, q)
		keep = min(keep, ttl)
		switch {
		case len(found.Addrs)+len(found.Services) > 0 || found.Alias != "":
			found.TTL = max(keep, minTTL)
			return found, found.TTL, nil
		case m.Rcode == dns.RcodeNameError:
			return Answer{}, negativeTTL(m), ErrNoName
		case m.Rcode != dns.RcodeSuccess:
			return Answer{}, failureTTL, fmt.Errorf("%w: %s", errRefused, dns.RcodeToString[m.Rcode])
		case alias == q.name:
			return Answer{}, negativeTTL(m), ErrNoData
		case alias == "":
			return Answer{}, maxNegative, errChain
		}
		q.name = alias
	}
	return Answer{}, maxNegative, errChain
}

var errChain = fmt.Errorf("%w: more than %d aliases in a row", errRefused, maxChain)

// exchange asks the servers in order until one gives an answer that can be used.
func (r *Resolver) exchange(ctx context.Context, q question) (*dns.Msg, error) {
	servers := r.conf.get().servers
	if len(r.opts.Servers) > 0 {
		servers = r.opts.Servers
	}
	var last error
	for range r.opts.Attempts {
		for _, server := range servers {
			m, err := r.exchangeWith(ctx, server, q)
			if err == nil && (m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError) {
				return m, nil
			}
			if ctx.Err() != nil {
				return nil, fmt.Errorf("%w: %w", ErrSilent, ctx.Err())
			}
			if err == nil {
				err = fmt.Errorf("%w: %s", errRefused, dns.RcodeToString[m.Rcode])
			}
			last = err
		}
	}
	r.opts.Logger.Debug("a name cannot be resolved", "name", q.name, "err", last)
	return nil, last
}

// exchangeWith asks one server over UDP from a port of its own, and over TCP where the answer does not fit (RFC 7766).
func (r *Resolver) exchangeWith(ctx context.Context, server netip.AddrPort, q question) (*dns.Msg, error) {
	m := new(dns.Msg)
	m.SetQuestion(q.name+".", q.qtype)
	m.SetEdns0(edns, false)
	for _, network := range []string{"udp", "tcp"} {
		reply, err := roundTrip(ctx, &dns.Client{Net: network, Timeout: r.opts.Timeout, UDPSize: edns}, server, m)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSilent, err)
		}
		if !answers(reply, m) {
			return nil, fmt.Errorf("%w: an answer to another question", errRefused)
		}
		if !reply.Truncated {
			return reply, nil
		}
	}
	return nil, fmt.Errorf("%w: an answer that is cut off even over TCP", errRefused)
}

// roundTrip sends a question and waits for the answer, until ctx ends as well.
func roundTrip(ctx context.Context, c *dns.Client, server netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	conn, err := c.DialContext(ctx, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	reply, _, err := c.ExchangeWithConnContext(ctx, m, conn)
	return reply, err
}

// answers tells whether a message is the reply to a question, as far as the id does not tell already.
func answers(reply, m *dns.Msg) bool {
	return reply.Response && len(reply.Question) == 1 && strings.EqualFold(reply.Question[0].Name, m.Question[0].Name) &&
		reply.Question[0].Qtype == m.Question[0].Qtype && reply.Question[0].Qclass == m.Question[0].Qclass
}

// read takes what answers a question out of a reply. alias is where the chain of aliases ends, q.name where there is none
// and "" where it does not end; ttl is the shortest on the way. Records that do not belong to the chain are ignored.
func read(m *dns.Msg, q question) (a Answer, alias string, ttl time.Duration) {
	alias, ttl = q.name, maxTTL
	for links := 0; ; links++ {
		next, t := aliasOf(m.Answer, alias)
		if next == "" {
			break
		}
		if links == maxChain {
			return a, "", ttl
		}
		if q.qtype == dns.TypeCNAME {
			a.Alias, ttl = next, min(ttl, t)
			return a, alias, ttl
		}
		alias, ttl = next, min(ttl, t)
	}
	for _, rr := range m.Answer {
		h := rr.Header()
		if owner, ok := canonical(h.Name); !ok || owner != alias || h.Class != dns.ClassINET {
			continue
		}
		if a.add(rr, q.qtype) {
			ttl = min(ttl, time.Duration(h.Ttl)*time.Second)
		}
	}
	return a, alias, ttl
}

// add takes a record of the type asked for.
func (a *Answer) add(rr dns.RR, qtype uint16) bool {
	switch rr := rr.(type) {
	case *dns.A:
		addr, ok := netip.AddrFromSlice(rr.A.To4())
		if ok = ok && qtype == dns.TypeA && len(a.Addrs) < maxAddrs; ok {
			a.Addrs = append(a.Addrs, addr)
		}
		return ok
	case *dns.AAAA:
		addr, ok := netip.AddrFromSlice(rr.AAAA.To16())
		if ok = ok && qtype == dns.TypeAAAA && len(a.Addrs) < maxAddrs; ok {
			a.Addrs = append(a.Addrs, addr)
		}
		return ok
	case *dns.SRV:
		ok := qtype == dns.TypeSRV && len(a.Services) < maxServices
		if ok {
			a.Services = append(a.Services, rr)
		}
		return ok
	}
	return false
}

// aliasOf gives a name's alias; "" where it has none, or one that is no host name.
func aliasOf(rrs []dns.RR, name string) (alias string, ttl time.Duration) {
	for _, rr := range rrs {
		c, ok := rr.(*dns.CNAME)
		if !ok || c.Hdr.Class != dns.ClassINET {
			continue
		}
		if owner, ok := canonical(c.Hdr.Name); ok && owner == name {
			alias, _ = canonical(c.Target)
			return alias, time.Duration(c.Hdr.Ttl) * time.Second
		}
	}
	return "", 0
}

// negativeTTL is how long the absence of a record may be kept (RFC 2308, section 5).
func negativeTTL(m *dns.Msg) time.Duration {
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			ttl := time.Duration(min(soa.Minttl, soa.Hdr.Ttl)) * time.Second
			return min(max(ttl, minTTL), maxNegative)
		}
	}
	return minTTL
}

// canonical gives a name of a DNS message as grants know it; false where it is no host name.
func canonical(name string) (string, bool) { return policy.CanonicalName(name) }
