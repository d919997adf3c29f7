// Package namestest is a DNS server on loopback for tests, which stands where a private network's is.
package namestest

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// Upstream answers from a table, over UDP and TCP.
type Upstream struct {
	Addr netip.AddrPort

	mu       sync.Mutex
	records  map[string][]dns.RR // by lower-case name without a final dot
	rcode    int
	silent   bool
	truncate bool
	asked    map[string]int // by name and type, "db.internal A"
	servers  []*dns.Server
	running  sync.WaitGroup
}

// New starts a server; the test ends it.
func New(t testing.TB) *Upstream {
	t.Helper()
	u := &Upstream{records: map[string][]dns.RR{}, asked: map[string]int{}}
	packet, stream := listen(t)
	u.Addr = netip.MustParseAddrPort(packet.LocalAddr().String())
	for _, s := range []*dns.Server{{PacketConn: packet}, {Listener: stream}} {
		s.Handler = u
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		u.servers = append(u.servers, s)
		u.running.Go(func() { _ = s.ActivateAndServe() })
		<-ready
	}
	t.Cleanup(func() {
		for _, s := range u.servers {
			_ = s.Shutdown()
		}
		u.running.Wait()
	})
	return u
}

// listen takes one port for both protocols.
func listen(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 50 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p, err := net.ListenPacket("udp4", l.Addr().String())
		if err == nil {
			return p, l
		}
		_ = l.Close()
	}
	t.Fatal("no port is free for both UDP and TCP")
	return nil, nil
}

// Set replaces the records of a name by those of a zone file's lines, such as "db.internal. 60 IN A 10.0.0.5".
func (u *Upstream) Set(t testing.TB, name string, lines ...string) {
	t.Helper()
	var rrs []dns.RR
	for _, line := range lines {
		rr, err := dns.NewRR(line)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		rrs = append(rrs, rr)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.records[name] = rrs
}

// SetRcode makes every answer an error; 0 ends that.
func (u *Upstream) SetRcode(rcode int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.rcode = rcode
}

// SetSilent makes the server say nothing at all.
func (u *Upstream) SetSilent(silent bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.silent = silent
}

// SetTruncate makes answers over UDP say that they were cut off.
func (u *Upstream) SetTruncate(truncate bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.truncate = truncate
}

// Asked counts the questions for a name and type since the start, such as "db.internal A".
func (u *Upstream) Asked(question string) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asked[question]
}

// Questions counts all questions since the start.
func (u *Upstream) Questions() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := 0
	for _, asked := range u.asked {
		n += asked
	}
	return n
}

// ServeDNS implements dns.Handler: the records of the name and type, an alias for any type, or their absence with an SOA.
func (u *Upstream) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	u.mu.Lock()
	asked := q.Question[0]
	name := strings.ToLower(strings.TrimSuffix(asked.Name, "."))
	u.asked[name+" "+dns.TypeToString[asked.Qtype]]++
	silent, rcode := u.silent, u.rcode
	m := new(dns.Msg)
	m.SetReply(q)
	_, overUDP := w.RemoteAddr().(*net.UDPAddr)
	switch rrs, known := u.records[name]; {
	case rcode != 0:
		m.Rcode = rcode
	case u.truncate && overUDP:
		m.Truncated = true
	case known:
		u.fill(m, rrs, asked.Qtype)
	default:
		m.Rcode = dns.RcodeNameError
	}
	u.mu.Unlock()
	if silent {
		return
	}
	if rcode == 0 && len(m.Answer) == 0 {
		m.Ns = append(m.Ns, &dns.SOA{
			Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 60}, Ns: "ns.", Mbox: "root.", Minttl: 60,
		})
	}
	if overUDP {
		m.Truncate(1232)
	}
	_ = w.WriteMsg(m)
}

// fill adds the records of one type, and where there is an alias, what it leads to.
func (u *Upstream) fill(m *dns.Msg, rrs []dns.RR, qtype uint16) {
	for range 16 {
		var alias *dns.CNAME
		for _, rr := range rrs {
			if c, ok := rr.(*dns.CNAME); ok {
				alias = c
			}
			if rr.Header().Rrtype == qtype || rr.Header().Rrtype == dns.TypeCNAME {
				m.Answer = append(m.Answer, rr)
			}
		}
		if alias == nil || qtype == dns.TypeCNAME {
			return
		}
		rrs = u.records[strings.ToLower(strings.TrimSuffix(alias.Target, "."))]
	}
}
