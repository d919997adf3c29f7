package forward

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// published are common egress policies, written in ours, with what they let through and what not.
var published = []struct {
	name, lines  string
	open, closed string // "tcp 10.0.0.1:53", spaces and commas between
}{
	{"DNS to one resolver alone", "tcp,udp 10.0.0.53:53",
		"udp 10.0.0.53:53,tcp 10.0.0.53:53", "udp 10.0.0.54:53,udp 10.0.0.52:53,udp 8.8.8.8:53,tcp 10.0.0.53:52,tcp 10.0.0.53:54,udp 10.0.0.53:853"},
	{"the database's port in three subnets", "tcp 10.1.0.0/24:5432|tcp 10.2.0.0/24:5432|tcp 10.3.0.0/24:5432",
		"tcp 10.1.0.0:5432,tcp 10.1.0.255:5432,tcp 10.2.0.7:5432,tcp 10.3.0.255:5432",
		"tcp 10.0.255.255:5432,tcp 10.1.1.0:5432,tcp 10.4.0.0:5432,tcp 10.1.0.1:5431,tcp 10.1.0.1:5433,udp 10.1.0.1:5432"},
	{"both ends of a range of ports", "tcp 10.1.0.1:8000-8100",
		"tcp 10.1.0.1:8000,tcp 10.1.0.1:8050,tcp 10.1.0.1:8100", "tcp 10.1.0.1:7999,tcp 10.1.0.1:8101,tcp 10.1.0.1:1,tcp 10.1.0.1:65535"},
	{"the public internet, all else stripped", "tcp,udp internet:443",
		"tcp 1.1.1.1:443,udp 8.8.8.8:443,tcp 9.255.255.255:443,tcp 11.0.0.0:443,tcp 172.15.255.255:443,tcp 172.32.0.0:443,tcp 192.167.255.255:443,tcp 192.169.0.0:443," +
			"tcp 100.63.255.255:443,tcp 100.128.0.0:443,tcp [2606:4700::1111]:443,udp [2a00::1]:443",
		"tcp 1.1.1.1:80,tcp 0.1.2.3:443,tcp 10.0.0.0:443,tcp 10.255.255.255:443,tcp 100.64.0.0:443,tcp 100.127.255.255:443,tcp 127.0.0.1:443,tcp 169.254.0.1:443," +
			"tcp 172.16.0.0:443,tcp 172.31.255.255:443,tcp 192.0.0.1:443,tcp 192.0.2.1:443,tcp 192.88.99.1:443,tcp 192.168.0.0:443,tcp 192.168.255.255:443," +
			"tcp 198.51.100.1:443,tcp 203.0.113.1:443,tcp 240.0.0.1:443,tcp [fd00::1]:443,tcp [fc00::1]:443,tcp [fec0::1]:443," +
			"tcp [2001:db8::1]:443,tcp [2001::1]:443,tcp [2002:a00:1::]:443,tcp [64:ff9b::a00:1]:443,tcp [3fff::1]:443"},
}

// never are addresses that no range opens, however wide: of every kind the ends, and for the dangerous ones every spelling.
var never = strings.Fields(`
	169.254.169.254 169.254.169.253 169.254.170.2 169.254.170.23 169.254.0.23 169.254.42.42 168.63.129.16 100.100.100.200 192.0.0.192
	169.254.0.0 169.254.0.1 169.254.255.255 127.0.0.0 127.0.0.1 127.0.0.53 127.255.255.255 0.0.0.0 0.0.0.1 0.255.255.255
	10.7.7.7 198.18.0.3 198.18.255.255 198.19.255.255
	::1 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:42::42 fe80::1 fe80::a9fe:a9fe febf::1 fd63:756c:7665:7274::c612:3
	64:ff9b::a9fe:a9fe 64:ff9b::7f00:1 64:ff9b::a83f:8110 64:ff9b::a07:707 64:ff9b::c612:3 64:ff9b::a9fe:1 64:ff9b::0.0.0.1
	2002:a9fe:a9fe:: 2002:7f00:1:: 2002:a07:707::1 2002:a83f:8110:: 2001::5601:5601 2001::80ff:fffe
	::ffff:169.254.169.254 ::ffff:127.0.0.1 ::ffff:10.7.7.7 ::ffff:198.18.0.3 64:ff9b:1::a9fe:a9fe 64:ff9b:1::7f00:1
	::169.254.169.254 ::127.0.0.1 ::10.7.7.7 ::ffff:0:169.254.169.254 ::ffff:0:127.0.0.1`)

// named are flows to names: to the address that the gateway gives, at a port, where the private network's DNS says what stands in records.
// What is to be let through leads to this machine, which the gateway's own policy opens for it.
var named = []struct {
	lines, name, records string
	flow                 string // protocol and port
	open                 bool
}{
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 127.0.0.1", "tcp 5432", true},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN AAAA ::1", "tcp 5432", true},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 10.0.0.5", "tcp 5431", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 10.0.0.5", "tcp 5433", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 10.0.0.5", "udp 5432", false},
	{"tcp db.internal:5432", "db.internal", "", "tcp 5432", true}, // granted, though it does not exist: that is not policy's
	{"tcp *.svc.corp:443", "a.svc.corp", "a.svc.corp. 60 IN A 127.0.0.1", "tcp 443", true},
	{"tcp *.svc.corp:443", "a.b.c.svc.corp", "a.b.c.svc.corp. 60 IN A 127.0.0.1", "tcp 443", true},
	{"tcp *.svc.corp:443", "a.svc.corp", "a.svc.corp. 60 IN A 10.0.0.5", "tcp 80", false},
	{"tcp *.svc.corp:443|tcp a.svc.corp:80", "a.svc.corp", "a.svc.corp. 60 IN A 127.0.0.1", "tcp 80", true},
	{"tcp *.svc.corp:443|tcp a.svc.corp:80", "b.svc.corp", "b.svc.corp. 60 IN A 10.0.0.5", "tcp 80", false},
	// Rebinding: a granted name that has come to lead where nothing may go.
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 169.254.169.254", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 127.0.0.1", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 168.63.129.16", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 10.7.7.7", "tcp 5432", false}, // the gateway itself
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN A 198.18.0.3", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN AAAA ::ffff:127.0.0.1", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN AAAA 64:ff9b::a9fe:a9fe", "tcp 5432", false},
	{"tcp db.internal:5432", "db.internal", "db.internal. 60 IN AAAA fd00:ec2::254", "tcp 5432", false},
	{"tcp *.svc.corp:443", "meta.svc.corp", "meta.svc.corp. 60 IN A 169.254.169.254", "tcp 443", false},
	{"tcp *.svc.corp:443", "meta.svc.corp", "meta.svc.corp. 60 IN AAAA ::1", "tcp 443", false},
	// An alias is followed, and what it leads to is held against what is always denied.
	{"tcp www.internal:80", "www.internal", "www.internal. 60 IN CNAME other.example.|other.example. 60 IN A 127.0.0.1", "tcp 80", true},
	{"tcp www.internal:80", "www.internal", "www.internal. 60 IN CNAME other.example.|other.example. 60 IN A 169.254.169.254", "tcp 80", false},
	{"tcp www.internal:80", "www.internal", "www.internal. 60 IN CNAME other.example.|other.example. 60 IN A 127.0.0.1", "tcp 80", false},
}

// ungranted are names that a job gets no address for.
var ungranted = []struct{ lines, name string }{
	{"tcp www.internal:80", "other.example"}, // where its alias leads
	{"tcp *.svc.corp:443", "svc.corp"}, {"tcp *.svc.corp:443", "corp"}, {"tcp *.svc.corp:443", "asvc.corp"}, {"tcp *.svc.corp:443", "a.svc.corp.evil.example"},
	{"tcp db.internal:5432", "x.db.internal"}, {"tcp db.internal:5432", "internal"}, {"tcp 10.0.0.0/8:*", "db.internal"}, {"tcp internet:443", "example.com"},
}

// TestConformanceOfNames does for names what [TestConformance] does for addresses.
func TestConformanceOfNames(t *testing.T) {
	n := newNamedEnv(t, Limits{DialTimeout: 20 * time.Second, SessionRate: 1 << 20})
	n.job.SetAddresses([]netip.Addr{job4, job6})
	n.join("tcp 10.0.0.1:1", "")
	for i, c := range named {
		offered, local := c.lines, ""
		if c.open {
			offered, local = c.lines+"|tcp 127.0.0.1:*|tcp [::1]:*", own
		}
		n.s.SetScope(realScope(t, offered, local))
		byOwner := map[string][]string{c.name: nil}
		for line := range strings.SplitSeq(c.records, "|") {
			if owner, _, ok := strings.Cut(line, ". "); ok {
				byOwner[owner] = append(byOwner[owner], line)
			}
		}
		for owner, lines := range byOwner {
			n.up.Set(t, owner, lines...)
		}
		n.f.resolver = freshResolver(t, n.up) // instead of waiting for the last answer to expire
		before := n.s.Counts()
		proto, at, _ := strings.Cut(c.flow, " ")
		dst := n.at(c.name, at)
		if proto == "tcp" {
			n.gatewaySees(syn(netip.AddrPortFrom(job4, uint16(2000+i)), netip.MustParseAddrPort(dst), 1))
		} else if _, err := n.udp(dst).Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a verdict on "+c.name, func() bool {
			now := n.s.Counts()
			return now.Allowed+now.Denied > before.Allowed+before.Denied
		})
		if allowed := n.s.Counts().Allowed > before.Allowed; allowed != c.open {
			t.Errorf("%q, %q: %s %s is let through: %v", c.lines, c.records, c.flow, c.name, allowed)
		}
	}
	for _, c := range ungranted {
		n.s.SetScope(realScope(t, c.lines, ""))
		if addr, ok := n.s.serviceAddr(c.name); ok {
			t.Errorf("%q: %s has the address %v", c.lines, c.name, addr)
		}
	}
}

// TestConformance sends packets of a job through the gateway's real data plane and reads the verdict from what it traces.
func TestConformance(t *testing.T) {
	n := newNamedEnv(t, Limits{DialTimeout: time.Nanosecond, SessionRate: 1 << 20}) // what is allowed is never really dialled
	n.job.SetAddresses([]netip.Addr{job4, job6})
	cases := 0
	try := func(scope *policy.Scope, flow string, open bool) {
		t.Helper()
		cases++
		proto, dst, _ := strings.Cut(flow, " ")
		n.s.SetScope(scope)
		n.records.forget()
		port := uint16(1024 + 2*cases)
		if to := netip.MustParseAddrPort(dst); proto == "tcp" {
			n.gatewaySees(syn(netip.AddrPortFrom(familyOf(dst), port), to, 1))
		} else if _, err := n.udp(dst).Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if open {
			eventually(t, flow+" is let through", func() bool { return n.records.has(proto, dst, wire.FlowAllowed) })
			return
		}
		if proto == "udp" {
			eventually(t, flow+" is turned away", func() bool { return n.records.has(proto, dst, wire.FlowRefused) })
		}
		if n.records.has(proto, dst, wire.FlowAllowed) || n.s.find(flowKey{policy.TCP, netip.AddrPortFrom(familyOf(dst), port), netip.MustParseAddrPort(dst)}) != nil {
			t.Errorf("%s is let through", flow) // some addresses the stack itself drops, without a word to anybody
		}
	}
	n.join("tcp 10.0.0.1:1", "")
	for _, p := range published {
		for flow := range strings.SplitSeq(p.open, ",") {
			try(realScope(t, p.lines, ""), flow, true)
		}
		for flow := range strings.SplitSeq(p.closed, ",") {
			try(realScope(t, p.lines, ""), flow, false)
		}
	}
	const all = "tcp 0.0.0.0/0:*|tcp [::/0]:*"
	for _, local := range []string{"", all} {
		for _, a := range never {
			for _, port := range []uint16{1, 65535} {
				try(realScope(t, all, local), "tcp "+netip.AddrPortFrom(netip.MustParseAddr(a), port).String(), false)
			}
		}
	}
	if cases < 200 {
		t.Errorf("%d cases", cases)
	}
	t.Logf("%d cases", cases)
}

// has tells whether a flow was traced with a verdict.
func (r *records) has(proto, dst string, verdict wire.FlowVerdict) bool {
	for _, rec := range r.list() {
		if rec.Proto == proto && rec.Addr == netip.MustParseAddrPort(dst) && rec.Verdict == verdict {
			return true
		}
	}
	return false
}

func (r *records) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = nil
}

func familyOf(dst string) netip.Addr {
	if netip.MustParseAddrPort(dst).Addr().Is4() {
		return job4
	}
	return job6
}

func (n *namedEnv) gatewaySees(packet []byte) {
	n.t.Helper()
	if _, err := n.gateway.Write([][]byte{packet}, 0); err != nil {
		n.t.Fatal(err)
	}
}
