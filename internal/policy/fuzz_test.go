package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// FuzzLine holds what parses to what the grammar promises, and what does not to the form of errors.
func FuzzLine(f *testing.F) {
	for _, seed := range []string{
		"tcp 10.0.0.5:5432", "tcp,udp 10.0.0.0/24:53,853", "icmp fd00::/64", "tcp [fd00::/64]:8000-8100", "tcp internet:*", "icmp internet",
		"tcp db.internal:5432", "tcp [::ffff:1.2.3.4]:1", "tcp 10.0.0.1/24:1", "tcp [fe80::1%eth0]:1", "tcp :", "tcp []:1", "tcp [:1", "udp ::/0:1",
		"tcp 1.1.1.1:1-", "tcp 1.1.1.1:,", ", 1.1.1.1:1", "tcp\t1.1.1.1:1\n", "tcp 0:0", "tcp [1::2]:00080",
		"tcp *.svc.corp:443", "tcp *:1", "icmp DB.internal", "tcp a..b:1", "tcp -a:1", "tcp 10.0.0.5.corp:1", "tcp _x._y:1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		l, err := parseLine(text)
		if err != nil {
			if err.Message == "" || err.Next == "" || strings.ContainsAny(err.Message+err.Next, "\n\r") {
				t.Fatalf("%q: error %q, next %q", text, err.Message, err.Next)
			}
			return
		}
		if (l.protos == ICMP) != (len(l.ports) == 0) || l.protos == 0 {
			t.Fatalf("%q: protocols %d with ports %v", text, l.protos, l.ports)
		}
		for i, p := range l.ports {
			if p.lo == 0 || p.lo > p.hi || i > 0 && p.lo <= l.ports[i-1].hi {
				t.Fatalf("%q: ports %v", text, l.ports)
			}
		}
		if h := l.host; h.name != "" {
			if canonical, ok := CanonicalName(h.name); !ok || canonical != h.name || l.internet || l.prefix.IsValid() {
				t.Fatalf("%q: name %q, prefix %v", text, h, l.prefix)
			}
		} else if !l.internet && (l.prefix != l.prefix.Masked() || l.prefix.Addr().Is4In6() || l.prefix.Addr().Zone() != "") {
			t.Fatalf("%q: prefix %v", text, l.prefix)
		}
		if _, err := ParseGrant([]wire.Grant{{Rule: "r", Allow: text}}); err != nil {
			t.Fatalf("%q is a line but no grant: %v", text, err)
		}
	})
}

// FuzzParseFile looks for panics and for files that compile although a rule pins nobody.
func FuzzParseFile(f *testing.F) {
	f.Add([]byte(goodFile))
	f.Add([]byte("rules: [{name: a, match: {repository: '*/*'}, allow: [x]}]"))
	f.Add([]byte("rules:\n- name: a\n  match: {repository_owner: [acme, '*']}\n  allow: [tcp internet:443]\n"))
	f.Add([]byte("rules: [{name: a, match: {repository_id: 1, event_name: '**'}, allow: ['icmp ::/0'], max_session: 1h}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseFile("p.yaml", data, Options{})
		if err != nil {
			if e := problem.From(err); e.Code != problem.BadConfig || e.Next == "" || !strings.HasPrefix(e.Message, "p.yaml:") {
				t.Fatalf("error %#v", e)
			}
			return
		}
		stranger := claimSet{"iss": GitHub, "repository": "\x00/\x00", "repository_id": "x", "repository_owner": "\x00", "repository_owner_id": "x"}
		for _, r := range p.rules {
			if d := p.Evaluate(today, r.network, stranger); d.Allowed || d.Denial != nil {
				t.Fatalf("%q lets anyone in: %+v", data, d)
			}
			if _, err := ParseGrant(r.grants); err != nil {
				t.Fatalf("%q compiles, but its grants do not parse: %v", data, err)
			}
		}
	})
}

// FuzzGlob compares with the reference, which is a regular expression.
func FuzzGlob(f *testing.F) {
	f.Add("refs/heads/*", "refs/heads/main")
	f.Add("**/x*", "a/b/xc")
	f.Add("main|develop", "main")
	f.Add("*a*b**", "ab/\xff")
	f.Fuzz(func(t *testing.T, pattern, value string) {
		if len(pattern) > MaxPattern || len(value) > MaxClaim || value == "" || !isASCII(pattern+value) {
			return
		}
		g := compileGlob(pattern, foldAll)
		if got, want := g.match(value), reference(pattern, true).MatchString(value); got != want {
			t.Fatalf("%q against %q: %v, the reference says %v", pattern, value, got, want)
		}
	})
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0
}

// FuzzDecide looks for closed addresses that a grant of everything opens, in whatever spelling.
func FuzzDecide(f *testing.F) {
	for _, seed := range []string{"::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "2002:a9fe:a9fe::", "2001::1", "169.254.169.254", "::", "8.8.8.8"} {
		raw, _ := netip.MustParseAddr(seed).MarshalBinary()
		f.Add(raw, uint16(80))
	}
	s := scopeOf(f, everything, everything)
	f.Fuzz(func(t *testing.T, raw []byte, port uint16) {
		a, ok := netip.AddrFromSlice(raw)
		if !ok || !s.Decide(Flow{TCP, netip.AddrPortFrom(a, port)}).Allowed {
			return
		}
		in := embedded(a.Unmap())
		for _, b := range append([]netip.Addr{a.Unmap()}, in.addrs[:in.n]...) {
			if closedBy(b) != nil || contains(s.Overlay, b) || s.Own(b) {
				t.Fatalf("%s is open, which stands for %s", a, b)
			}
		}
	})
}
