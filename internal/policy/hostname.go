package policy

import (
	"fmt"
	"strings"
)

// maxHost is how long a name may be, in bytes without a final dot (RFC 1035, section 2.3.4).
const maxHost = 253

// hostName is a name that a line grants: "db.internal", or with wild "*.svc.corp", which stands for every name below
// svc.corp at any depth but not for svc.corp itself, as a wildcard does in DNS (RFC 4592, section 2.1.1).
type hostName struct {
	name string // canonical, without "*."
	wild bool
}

// String gives the name as a line writes it.
func (h hostName) String() string {
	if h.wild {
		return "*." + h.name
	}
	return h.name
}

// CanonicalName gives a name as grants know it: lower case, no final dot. False for what is no host name: it has no label,
// an empty or overlong one, or other characters than letters, digits, '-' and '_'.
func CanonicalName(s string) (string, bool) {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > maxHost {
		return "", false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return "", false
		}
	}
	return strings.ToLower(s), true
}

func isLabel(label string) bool {
	if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
		return false
	}
	return strings.IndexFunc(label, func(r rune) bool {
		return r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) < 0
}

// parseHost reads the target of a line that grants by name.
func parseHost(s string) (hostName, *Error) {
	rest, wild := strings.CutPrefix(s, "*.")
	switch {
	case s == "*":
		return hostName{}, fault("", `"*" is every name, also of strangers' domains, which may point anywhere inside`,
			`name a domain of your own, such as *.corp.example, or "internet" for public addresses`)
	case strings.Contains(rest, "*"):
		return hostName{}, fault("", fmt.Sprintf("%q has a wildcard in the middle", s),
			"write the wildcard as the whole first label: *.svc.corp stands for every name below svc.corp, at any depth")
	case strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) >= 0:
		return hostName{}, fault("", fmt.Sprintf("%q is not a name in ASCII", s), "write it as DNS carries it, in the form xn--…")
	}
	name, ok := CanonicalName(rest)
	if !ok || strings.HasSuffix(s, ".") {
		return hostName{}, fault("", fmt.Sprintf("%q is no address, no CIDR and no host name", s),
			"write letters, digits, hyphens and dots, without a dot at the end")
	}
	return hostName{name: name, wild: wild}, nil
}

// checkEffect refuses names that always stand for the gateway itself.
func (h hostName) checkEffect() *Error {
	if h.name == "localhost" || strings.HasSuffix(h.name, ".localhost") { // RFC 6761, section 6.3
		return fault("", fmt.Sprintf("%q is the gateway itself, which no name opens", h), "name the exact address in its network that the service listens on, such as 10.20.0.2, in this file and in the gateway's own --policy")
	}
	return nil
}

// covers tells whether every name that o stands for is one that h stands for.
func (h hostName) covers(o hostName) bool {
	if !h.wild {
		return h == o
	}
	return strings.HasSuffix(o.name, "."+h.name) || o.wild && o.name == h.name
}
