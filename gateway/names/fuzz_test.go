package names

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func packed(f *testing.F, name string, qtype uint16, change func(*dns.Msg)) []byte {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	if change != nil {
		change(m)
	}
	b, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	return b
}

// FuzzQuery sends the server whatever bytes: what comes back has to be a DNS message, answer only what is granted, and give
// out nothing but service addresses.
func FuzzQuery(f *testing.F) {
	f.Add(packed(f, "db.internal.", dns.TypeA, nil))
	f.Add(packed(f, "a.b.svc.corp.", dns.TypeAAAA, func(m *dns.Msg) { m.SetEdns0(512, true) }))
	f.Add(packed(f, "_pg._tcp.db.internal.", dns.TypeSRV, nil))
	f.Add(packed(f, "evil.example.", dns.TypeANY, nil))
	f.Add(packed(f, "1.0.19.198.in-addr.arpa.", dns.TypePTR, nil))
	f.Add(packed(f, `x\000y\..svc.corp.`, dns.TypeCNAME, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }))
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	r := resolver(f, nil, nil)
	r.Close() // it knows what is below and asks nobody
	good := time.Now().Add(time.Hour)
	r.cache.put(question{"db.internal", dns.TypeA}, entry{answer: Answer{Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.5")}}, expires: good})
	r.cache.put(question{"_pg._tcp.db.internal", dns.TypeSRV}, entry{answer: Answer{
		TTL: time.Minute, Services: []*dns.SRV{{Port: 5432, Target: "DB.internal."}, {Port: 5432, Target: "evil.example."}},
	}, expires: good})
	r.cache.put(question{"a.svc.corp", dns.TypeCNAME}, entry{answer: Answer{Alias: "evil.example"}, expires: good})
	s, err := NewServer(ServerOptions{Resolver: r, Ranges: ranges(f, "198.19.0.0/16"), Session: func(netip.Addr) Session { return nil }})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxQuery {
			return
		}
		a := newAsker(t, "tcp db.internal:5432", "tcp *.svc.corp:443") // anew, so that each input stands for itself
		q, reply := s.parse(a, b)
		if q != nil {
			reply = s.answer(t.Context(), a, q)
		}
		if reply == nil {
			return
		}
		out, err := reply.Pack()
		if err != nil {
			t.Fatalf("a reply cannot be sent: %v", err)
		}
		var back dns.Msg
		if err := back.Unpack(out); err != nil || !back.Response {
			t.Fatalf("a reply is no DNS message: %v", err)
		}
		for _, rr := range append(back.Answer, back.Extra...) {
			checkRecord(t, a, rr)
		}
	})
}

// checkRecord fails for what no reply may hold.
func checkRecord(t *testing.T, a *asker, rr dns.RR) {
	owner, _ := canonical(rr.Header().Name)
	var addr netip.Addr
	switch rr := rr.(type) {
	case *dns.A:
		addr, _ = netip.AddrFromSlice(rr.A.To4())
	case *dns.AAAA:
		addr, _ = netip.AddrFromSlice(rr.AAAA)
	case *dns.SRV:
		if target, ok := canonical(rr.Target); !ok || !a.KnowsName(target) {
			t.Fatalf("an SRV record leads to %s", rr.Target)
		}
		return
	case *dns.OPT:
		return
	case *dns.PTR:
		if !strings.HasSuffix(owner, ".arpa") {
			t.Fatalf("%v", rr)
		}
		return
	}
	if !a.book.ranges.Contains(addr) || !a.KnowsName(owner) {
		t.Fatalf("%v", rr)
	}
}

// FuzzReply reads whatever bytes an upstream may send: what is taken from them belongs to the question and is bounded.
func FuzzReply(f *testing.F) {
	for _, lines := range []string{
		"db.internal. 60 IN A 10.0.0.5", "db.internal. 60 IN CNAME a.internal.|a.internal. 1 IN A 10.0.0.6",
		"db.internal. 60 IN CNAME db.internal.", "evil.example. 60 IN A 10.0.0.9", "db.internal. 0 IN AAAA ::ffff:127.0.0.1",
		"db.internal. 4294967295 IN SRV 1 1 1 x.internal.",
	} {
		m := new(dns.Msg)
		m.SetQuestion("db.internal.", dns.TypeA)
		m.Response = true
		for line := range strings.SplitSeq(lines, "|") {
			rr, err := dns.NewRR(line)
			if err != nil {
				f.Fatal(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		b, _ := m.Pack()
		f.Add(b, uint16(dns.TypeA))
	}
	f.Fuzz(func(t *testing.T, b []byte, qtype uint16) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		found, alias, ttl := read(m, question{"db.internal", qtype})
		if len(found.Addrs) > maxAddrs || len(found.Services) > maxServices || ttl < 0 || ttl > maxTTL {
			t.Fatalf("%+v, %v", found, ttl)
		}
		for _, name := range []string{alias, found.Alias} {
			if c, ok := canonical(name); name != "" && (!ok || c != name) {
				t.Fatalf("alias %q", name)
			}
		}
		for _, addr := range found.Addrs {
			if addr.Is4() != (qtype == dns.TypeA) {
				t.Fatalf("%v for type %d", addr, qtype)
			}
		}
		if d := negativeTTL(m); d < minTTL || d > maxNegative {
			t.Fatalf("absence is kept for %v", d)
		}
	})
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("127.0.0.1 localhost\n::1 localhost ip6-localhost # x\nfe80::1%eth0 a\n"), []byte("nameserver 10.0.0.1\nsearch a b.c\noptions ndots:5\n"))
	f.Fuzz(func(t *testing.T, hosts, conf []byte) {
		for name, addrs := range parseHosts(hosts) {
			if c, ok := canonical(name); !ok || c != name || len(addrs) == 0 || len(addrs) > maxAddrs {
				t.Fatalf("%q: %v", name, addrs)
			}
		}
		if c := parseConf(conf); len(c.servers) == 0 || len(c.servers) > maxServers || len(c.search) > maxSearch {
			t.Fatalf("%+v", c)
		}
	})
}
