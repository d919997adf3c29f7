package names

import (
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// How long answers are good for, in seconds.
const (
	ttlExact    = 60 // a grant spells the name out: its address is the same at every gateway
	ttlWild     = 5  // another gateway learns of the name only when it is asked, so that jobs move within this time
	ttlNegative = 5
)

const refusedText = "the session's grant holds no such name"

// slow tells whether answering a question may have to wait for somebody.
func (s *Server) slow(session Session, q *dns.Msg) bool {
	switch q.Question[0].Qtype {
	case dns.TypeSRV, dns.TypeCNAME:
		return true
	case dns.TypeA, dns.TypeAAAA, dns.TypeANY:
		name, ok := canonical(q.Question[0].Name)
		return ok && session.ExactName(name)
	}
	return false
}

// answer answers a question that has been checked.
func (s *Server) answer(ctx context.Context, session Session, q *dns.Msg) *dns.Msg {
	asked := q.Question[0]
	m := new(dns.Msg)
	m.SetReply(q)
	m.Authoritative, m.RecursionAvailable, m.Compress = true, true, true
	if q.IsEdns0() != nil {
		m.SetEdns0(edns, false)
	}
	name, ok := canonical(asked.Name)
	if pointer, reverse := s.pointer(session, asked.Name); reverse {
		s.counts.answered.Add(1)
		answerPointer(m, pointer)
		return m
	}
	if !ok || !session.KnowsName(name) && !(asked.Qtype == dns.TypeSRV && session.KnowsName(base(name))) {
		s.refuse(session, m, asked.Name)
		return m
	}
	s.counts.answered.Add(1)
	switch asked.Qtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeANY:
		s.answerAddress(ctx, session, m, name)
	case dns.TypeSRV:
		s.answerService(ctx, session, m, name)
	case dns.TypeCNAME:
		s.answerAlias(ctx, session, m, name)
	default:
		absent(m, dns.RcodeSuccess, name)
	}
	return m
}

// maxService is how long the name of a service may be (RFC 6335, section 5.1).
const maxService = 15

// base is a name without the two labels in front that name a service and a protocol (RFC 2782). Under a granted name jobs may ask for these
// alone: each is a question that whoever runs the zone gets to see.
func base(name string) string {
	service, rest, _ := strings.Cut(name, ".")
	proto, rest, more := strings.Cut(rest, ".")
	if !more || len(service) < 2 || len(service) > 1+maxService || service[0] != '_' {
		return name
	}
	switch proto {
	case "_tcp", "_udp", "_tls", "_sctp", "_dccp":
		return rest
	}
	return name
}

// refuse says that a name is outside the grant (RFC 8914: blocked by policy), and tells who keeps account of it.
func (s *Server) refuse(session Session, m *dns.Msg, asked string) {
	s.counts.refused.Add(1)
	session.NameRefused(strings.ToLower(strings.TrimSuffix(asked, ".")))
	m.Rcode, m.Authoritative = dns.RcodeRefused, false
	if opt := m.IsEdns0(); opt != nil {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeProhibited, ExtraText: refusedText})
	}
}

// absent makes a negative answer (RFC 2308, section 2): the SOA is that of the domain above the name, with how long to
// remember the absence.
func absent(m *dns.Msg, rcode int, name string) {
	m.Rcode = rcode
	_, zone, _ := strings.Cut(name, ".")
	m.Ns = append(m.Ns, &dns.SOA{
		Hdr: dns.RR_Header{Name: zone + ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttlNegative},
		Ns:  "culvert.invalid.", Mbox: "hostmaster.culvert.invalid.",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: ttlNegative,
	})
}

// answerAddress answers with the name's service addresses. Only a name that a grant spells out is looked up first, so that
// what does not exist is not said to; a name under a wildcard is known not to exist only once a flow to it has found out.
func (s *Server) answerAddress(ctx context.Context, session Session, m *dns.Msg, name string) {
	exact := session.ExactName(name)
	missing := s.opts.Resolver.Missing(name)
	if missing == nil && exact {
		ctx, cancel := context.WithTimeout(ctx, patience)
		_, missing = s.opts.Resolver.Addrs(ctx, name, true)
		cancel()
	}
	switch {
	case errors.Is(missing, ErrNoName):
		absent(m, dns.RcodeNameError, name)
		return
	case errors.Is(missing, ErrNoData):
		absent(m, dns.RcodeSuccess, name)
		return
	}
	if !s.add(&m.Answer, session, m.Question[0].Name, name, m.Question[0].Qtype) {
		m.Rcode = dns.RcodeServerFailure
	}
}

// add adds a name's service addresses of the type asked for, under the owner as it was written. False says that the session
// has no more to give out.
func (s *Server) add(to *[]dns.RR, session Session, owner, name string, qtype uint16) bool {
	exact := session.ExactName(name)
	four, six, ok := session.Book().Lease(name, exact)
	if !ok {
		return false
	}
	head := dns.RR_Header{Name: owner, Class: dns.ClassINET, Ttl: ttlWild}
	if exact {
		head.Ttl = ttlExact
	}
	if qtype != dns.TypeAAAA {
		head.Rrtype = dns.TypeA
		*to = append(*to, &dns.A{Hdr: head, A: four.AsSlice()})
	}
	if qtype != dns.TypeA {
		head.Rrtype = dns.TypeAAAA
		*to = append(*to, &dns.AAAA{Hdr: head, AAAA: six.AsSlice()})
	}
	return true
}

// ask asks upstream for records that only it knows, within what the session may.
func (s *Server) ask(ctx context.Context, session Session, name string, qtype uint16) (Answer, error) {
	exact := session.ExactName(name)
	if !exact && !session.Book().Count(name) {
		return Answer{}, ErrBusy
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	return s.opts.Resolver.Ask(ctx, name, qtype, exact)
}

// answerService passes on SRV records (RFC 2782) whose targets are granted, with their addresses.
func (s *Server) answerService(ctx context.Context, session Session, m *dns.Msg, name string) {
	found, err := s.ask(ctx, session, name, dns.TypeSRV)
	if failed(m, err, name) {
		return
	}
	for _, srv := range found.Services {
		target, ok := canonical(srv.Target)
		if !ok || !session.KnowsName(target) {
			continue
		}
		if !s.add(&m.Extra, session, target+".", target, dns.TypeANY) {
			break
		}
		m.Answer = append(m.Answer, &dns.SRV{
			Hdr:      dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeSRV, Class: dns.ClassINET, Ttl: seconds(found.TTL)},
			Priority: srv.Priority, Weight: srv.Weight, Port: srv.Port, Target: target + ".",
		})
	}
	if len(m.Answer) == 0 {
		absent(m, dns.RcodeSuccess, name)
	}
}

// answerAlias passes on an alias that is granted itself. Others are none of the job's business: it gets at what is behind
// them through the name that is granted.
func (s *Server) answerAlias(ctx context.Context, session Session, m *dns.Msg, name string) {
	found, err := s.ask(ctx, session, name, dns.TypeCNAME)
	if failed(m, err, name) {
		return
	}
	if !session.KnowsName(found.Alias) {
		absent(m, dns.RcodeSuccess, name)
		return
	}
	m.Answer = append(m.Answer, &dns.CNAME{
		Hdr:    dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: seconds(found.TTL)},
		Target: found.Alias + ".",
	})
}

// failed turns what upstream says into the reply's code; false says that there is an answer.
func failed(m *dns.Msg, err error, name string) bool {
	switch {
	case err == nil:
		return false
	case errors.Is(err, ErrNoName):
		absent(m, dns.RcodeNameError, name)
	case errors.Is(err, ErrNoData):
		absent(m, dns.RcodeSuccess, name)
	default:
		m.Rcode = dns.RcodeServerFailure
	}
	return true
}

func seconds(d time.Duration) uint32 { return uint32(min(d, ttlExact*time.Second) / time.Second) }

// pointer gives the name behind a service address that is asked for backwards (RFC 1035, section 3.5); reverse says that
// the question is one for a service address at all.
func (s *Server) pointer(session Session, asked string) (name string, reverse bool) {
	addr, ok := reversed(strings.ToLower(strings.TrimSuffix(asked, ".")))
	if !ok || !s.opts.Ranges.Contains(addr) {
		return "", false
	}
	name, _ = session.Book().Name(addr)
	return name, true
}

func answerPointer(m *dns.Msg, name string) {
	asked := m.Question[0]
	zone, _ := strings.CutSuffix(asked.Name, ".")
	switch {
	case name == "":
		absent(m, dns.RcodeNameError, zone)
	case asked.Qtype != dns.TypePTR && asked.Qtype != dns.TypeANY:
		absent(m, dns.RcodeSuccess, zone)
	default:
		m.Answer = append(m.Answer, &dns.PTR{
			Hdr: dns.RR_Header{Name: asked.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: ttlWild},
			Ptr: name + ".",
		})
	}
}

// reversed reads an address out of its name for reverse lookups (RFC 1035, section 3.5; RFC 3596, section 2.5).
func reversed(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(rest, ".")
		var b [4]byte
		if len(labels) != len(b) {
			return netip.Addr{}, false
		}
		for i, label := range labels {
			n, err := strconv.ParseUint(label, 10, 8)
			if err != nil {
				return netip.Addr{}, false
			}
			b[3-i] = byte(n)
		}
		return netip.AddrFrom4(b), true
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	nibbles := strings.Split(rest, ".")
	if !ok || len(nibbles) != 32 {
		return netip.Addr{}, false
	}
	digits := make([]byte, 0, 32)
	for i := len(nibbles) - 1; i >= 0; i-- {
		if len(nibbles[i]) != 1 {
			return netip.Addr{}, false
		}
		digits = append(digits, nibbles[i][0])
	}
	var b [16]byte
	if _, err := hex.Decode(b[:], digits); err != nil {
		return netip.Addr{}, false
	}
	return netip.AddrFrom16(b), true
}
