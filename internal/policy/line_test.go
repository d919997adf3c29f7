package policy

import (
	"slices"
	"strings"
	"testing"
)

func TestParseLine(t *testing.T) {
	tests := []struct {
		text   string
		protos Proto
		prefix string // or a name; "" means internet
		ports  []portRange
	}{
		{"tcp 10.0.0.5:5432", TCP, "10.0.0.5/32", []portRange{{5432, 5432}}},
		{"udp 10.0.0.0/24:53", UDP, "10.0.0.0/24", []portRange{{53, 53}}},
		{"tcp,udp 10.0.0.0/24:53,853", TCP | UDP, "10.0.0.0/24", []portRange{{53, 53}, {853, 853}}},
		{"udp,tcp 10.0.0.0/24:*", TCP | UDP, "10.0.0.0/24", []portRange{{1, 65535}}},
		{"tcp 10.0.0.5:8000-8100", TCP, "10.0.0.5/32", []portRange{{8000, 8100}}},
		{"tcp 10.0.0.5:853,53,54,50-60,61", TCP, "10.0.0.5/32", []portRange{{50, 61}, {853, 853}}},
		{"tcp 10.0.0.5:1-65535", TCP, "10.0.0.5/32", []portRange{{1, 65535}}},
		{"tcp 10.0.0.5:65535,65534", TCP, "10.0.0.5/32", []portRange{{65534, 65535}}},
		{"icmp 10.0.0.0/24", ICMP, "10.0.0.0/24", nil},
		{"icmp fd00::/64", ICMP, "fd00::/64", nil},
		{"icmp [fd00::/64]", ICMP, "fd00::/64", nil},
		{"icmp fd00::1", ICMP, "fd00::1/128", nil},
		{"icmp internet", ICMP, "", nil},
		{"tcp internet:443", TCP, "", []portRange{{443, 443}}},
		{"tcp [fd00::1]:443", TCP, "fd00::1/128", []portRange{{443, 443}}},
		{"tcp [fd00::/64]:443", TCP, "fd00::/64", []portRange{{443, 443}}},
		{"tcp [64:ff9b::10.0.0.1]:443", TCP, "64:ff9b::a00:1/128", []portRange{{443, 443}}},
		{"tcp 0.0.0.0/0:443", TCP, "0.0.0.0/0", []portRange{{443, 443}}},
		{"tcp db.internal:5432", TCP, "db.internal", []portRange{{5432, 5432}}},
		{"tcp DB.Internal:5432", TCP, "db.internal", []portRange{{5432, 5432}}},
		{"tcp,udp *.svc.corp:53,443", TCP | UDP, "*.svc.corp", []portRange{{53, 53}, {443, 443}}},
		{"tcp registry:5000", TCP, "registry", []portRange{{5000, 5000}}},
		{"tcp 10-0-0-5.corp:*", TCP, "10-0-0-5.corp", []portRange{{1, 65535}}},
		{"tcp _ldap._tcp.corp:389", TCP, "_ldap._tcp.corp", []portRange{{389, 389}}},
		{"tcp xn--bcher-kva.example:443", TCP, "xn--bcher-kva.example", []portRange{{443, 443}}},
		{"icmp db.internal", ICMP, "db.internal", nil},
		{"tcp internet.corp:443", TCP, "internet.corp", []portRange{{443, 443}}},
		{" \ttcp   10.0.0.5:1 ", TCP, "10.0.0.5/32", []portRange{{1, 1}}},
	}
	for _, tt := range tests {
		l, err := parseLine(tt.text)
		if err != nil {
			t.Errorf("%q: %v", tt.text, err)
			continue
		}
		prefix := ""
		switch {
		case l.host.name != "":
			prefix = l.host.String()
		case !l.internet:
			prefix = l.prefix.String()
		}
		if l.protos != tt.protos || prefix != tt.prefix || !slices.Equal(l.ports, tt.ports) {
			t.Errorf("%q: got %+v", tt.text, l)
		}
	}
}

func TestParseLineRefuses(t *testing.T) {
	tests := []struct{ text, message, next string }{
		{"", "is not protocols", "tcp,udp"},
		{"tcp", "is not protocols", ""},
		{"10.0.0.1:443", "is not protocols", ""},
		{"tcp 10.0.0.1:53, 54", "is not protocols", ""},
		{"tcp 10.0.0.1 443", "is not protocols", ""},
		{"TCP 10.0.0.1:1", `unknown protocol "TCP"`, "lower case"},
		{"sctp 10.0.0.1:1", "unknown protocol", ""},
		{"tcp, 10.0.0.1:1", `unknown protocol ""`, ""},
		{"tcp,tcp 10.0.0.1:1", "stands twice", ""},
		{"tcp,icmp 10.0.0.1:1", "cannot share a line", "own"},
		{"icmp 10.0.0.1:1", "icmp has no ports", ""},
		{"icmp 10.0.0.1:", "icmp has no ports", ""},
		{"icmp [fd00::1]:1", "icmp has no ports", ""},
		{"tcp 10.0.0.1", "has no port", "10.0.0.1:443"},
		{"tcp internet", "has no port", "internet:*"},
		{"tcp [fd00::1]", "has no port", "[fd00::1]:443"},
		{"tcp fd00::1", "has no port", "[fd00::1]:443"},
		{"tcp fd00::/64", "has no port", "[fd00::/64]:443"},
		{"tcp 10.0.0.1:", "is no port", ""},
		{"tcp 10.0.0.1:0", `"0" is no port`, ""},
		{"tcp 10.0.0.1:65536", "is no port", ""},
		{"tcp 10.0.0.1:-1", "is no port", ""},
		{"tcp 10.0.0.1:+1", "is no port", ""},
		{"tcp 10.0.0.1:080", "is no port", ""},
		{"tcp 10.0.0.1:http", "is no port", ""},
		{"tcp 10.0.0.1:1-", "is no port", ""},
		{"tcp 10.0.0.1:1-2-3", "is no port", ""},
		{"tcp 10.0.0.1:1,,2", "is no port", ""},
		{"tcp 10.0.0.1:*,1", "is no port", ""},
		{"tcp 10.0.0.1:90-80", "runs backwards", "80-90"},
		{"tcp 10.0.0.1:" + strings.Repeat("1,", MaxPorts) + "1", "more than", ""},
		{"tcp 10.0.0.1/24:1", "beyond its /24", "10.0.0.0/24"},
		{"tcp [fd00::1/64]:1", "beyond its /64", "fd00::/64"},
		{"tcp 10.0.0.0/33:1", "no CIDR", ""},
		{"tcp 10.0.0.0/:1", "no CIDR", ""},
		{"tcp 10.0.0.0/08:1", "no CIDR", ""},
		{"tcp 10.0.0/24:1", "no CIDR", ""},
		{"tcp 10.0.0.256:1", "no address", ""},
		{"tcp 010.0.0.1:1", "no address", ""},
		{"tcp :443", "no address", ""},
		{"tcp [fe80::1%eth0]:1", "names an interface", ""},
		{"tcp [::ffff:10.0.0.1]:1", "IPv6 dress", "write 10.0.0.1"},
		{"tcp [::ffff:10.0.0.0/120]:1", "IPv6 dress", ""},
		{"tcp [10.0.0.1]:1", "only IPv6", "brackets"},
		{"tcp [fd00::1:1", "is no target", ""},
		{"tcp [fd00::]/64:1", "is no target", "[fd00::/64]:443"},
		{"tcp [fd00::1]443", "is no target", ""},
		{"tcp Internet:443", "unknown target", "lower case"},
		{"tcp db.internal", "has no port", "db.internal:443"},
		{"icmp db.internal:1", "icmp has no ports", ""},
		{"tcp *:443", "every name", "internet"},
		{"tcp *.:443", "no host name", ""},
		{"tcp **.corp:443", "wildcard in the middle", "any depth"},
		{"tcp *.*.corp:443", "wildcard in the middle", ""},
		{"tcp db-*.corp:443", "wildcard in the middle", ""},
		{"tcp a.*.corp:443", "wildcard in the middle", ""},
		{"tcp db..corp:443", "no host name", ""},
		{"tcp .corp:443", "no host name", ""},
		{"tcp db.corp.:443", "no host name", "without a dot"},
		{"tcp -db.corp:443", "no host name", ""},
		{"tcp db-.corp:443", "no host name", ""},
		{"tcp db!.corp:443", "no host name", ""},
		{"tcp b\u00fccher.example:443", "not a name in ASCII", "xn--"},
		{"tcp " + strings.Repeat("x", 64) + ".corp:443", "no host name", ""},
		{"tcp " + strings.Repeat("x.", 127) + "corp:443", "no host name", ""},
		{"tcp db.internal/24:443", "no CIDR", "one host"},
		{"tcp https://db.internal:443", "no CIDR", "a name"},
		{"tcp " + strings.Repeat("x", MaxLine), "longer than", ""},
	}
	for _, tt := range tests {
		_, err := parseLine(tt.text)
		if err == nil {
			t.Errorf("%.40q parses", tt.text)
			continue
		}
		if !strings.Contains(err.Message, tt.message) || !strings.Contains(err.Next, tt.next) || err.Next == "" {
			t.Errorf("%.40q: %q, next %q", tt.text, err.Message, err.Next)
		}
	}
}
