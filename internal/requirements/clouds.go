package requirements

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Rule is what a cloud's firewall is told: rows of one party that are let through in the same way.
type Rule struct {
	Party     Party
	Direction Direction
	Protocol  string // "TCP", "UDP", or all that rules grant
	From, To  uint16 // ports; both 0 where rules say which
	Peers     []string
	When      string // "always", or when it is needed
	Rows      []string
}

// Peers of a rule.
const (
	anywhere       = "anywhere"
	theCoordinator = "the coordinator"
	theRelays      = "relays"
	theNATS        = "the NATS servers"
	theGrants      = "what rules grant"
)

// local says of a row why no cloud's firewall has to know of it, "" where it has to.
func local(r Row) string {
	switch what := strings.TrimPrefix(r.ID, string(r.Party)+"/"); what {
	case "dns":
		return "a cloud's own resolver is within reach whatever its firewall says"
	case "router":
		return "a cloud's router forwards no ports"
	case "metrics", "private":
		return "on loopback, unless an operator says otherwise"
	}
	return ""
}

// peer says in a firewall's terms who is at the other end.
func peer(r Row) string {
	switch what := strings.TrimPrefix(r.ID, string(r.Party)+"/"); {
	case r.Direction == In:
		return anywhere
	case what == "coordinator" || what == "stun" || what == "probe":
		return theCoordinator
	case strings.HasPrefix(what, "relay-"):
		return theRelays
	case what == "nats":
		return theNATS
	case what == "targets":
		return theGrants
	}
	return anywhere // names whose addresses change, and the other side of direct paths
}

var portNumbers = regexp.MustCompile(`^(\d+)(?:–(\d+))?`)

// ports reads a row's default ports. Whoever is on the internet may have any but the first 1024.
func ports(r Row) (from, to uint16) {
	m := portNumbers.FindStringSubmatch(r.Port)
	if m == nil {
		if strings.HasPrefix(r.Port, "any") {
			return 1024, 65535
		}
		return 0, 0
	}
	a, _ := strconv.ParseUint(m[1], 10, 16)
	b := a
	if m[2] != "" {
		b, _ = strconv.ParseUint(m[2], 10, 16)
	}
	return uint16(a), uint16(b)
}

// Rules gives what a firewall around a party has to let through, in the order of its rows.
func Rules(p Party) []Rule {
	var all []Rule
	for _, r := range For(p) {
		if local(r) != "" {
			continue
		}
		from, to := ports(r)
		when := r.When
		if r.Required && !strings.HasPrefix(r.When, "with") {
			when = Always
		}
		i := slices.IndexFunc(all, func(o Rule) bool {
			return o.Direction == r.Direction && o.Protocol == r.Protocol && o.From == from && o.To == to
		})
		if i < 0 {
			all = append(all, Rule{Party: p, Direction: r.Direction, Protocol: r.Protocol, From: from, To: to, When: when})
			i = len(all) - 1
		}
		rule := &all[i]
		rule.Rows = append(rule.Rows, r.ID)
		if !slices.Contains(rule.Peers, peer(r)) {
			rule.Peers = append(rule.Peers, peer(r))
		}
		if when == Always {
			rule.When = Always
		}
	}
	return all
}

// peers gives the other end in a cloud's words for "anywhere".
func (r Rule) peers(everywhere string) string {
	if slices.Contains(r.Peers, anywhere) {
		return everywhere
	}
	return strings.Join(r.Peers, ", ")
}

// ports gives the ports as a range with this dash.
func (r Rule) ports(dash string) string {
	switch {
	case r.From == 0:
		return "as granted"
	case r.From == r.To:
		return strconv.Itoa(int(r.From))
	}
	return fmt.Sprintf("%d%s%d", r.From, dash, r.To)
}

// name is for clouds whose rules have one.
func (r Rule) name() string {
	if r.From == 0 {
		return fmt.Sprintf("culvert-%s-%s-granted", r.Party, r.Direction)
	}
	return fmt.Sprintf("culvert-%s-%s-%s-%d", r.Party, r.Direction, strings.ToLower(r.Protocol), r.From)
}

// Cloud is a kind of firewall that a cloud has.
type Cloud string

// The clouds. A security group, Azure's and Google's let answers through by themselves; a network ACL does not.
const (
	SecurityGroup Cloud = "aws-security-group"
	NetworkACL    Cloud = "aws-network-acl"
	Azure         Cloud = "azure-nsg"
	Google        Cloud = "gcp-firewall"
)

// Clouds lists them.
func Clouds() []Cloud { return []Cloud{SecurityGroup, NetworkACL, Azure, Google} }

// CloudMarkdown writes all parties' rules as a table in a cloud's own terms.
func CloudMarkdown(c Cloud) string {
	head, line := columns(c)
	var b strings.Builder
	fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	for _, p := range []Party{Runner, Gateway, Coordinator, Relay} {
		for i, r := range Rules(p) {
			for _, cells := range line(i, r) {
				fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
			}
		}
	}
	return b.String()
}

// columns gives a table's head, and how one rule, the i-th of its party, is written.
func columns(c Cloud) (head []string, line func(i int, r Rule) [][]string) {
	const all = "0.0.0.0/0, ::/0"
	one := func(cells ...string) [][]string { return [][]string{cells} }
	bound := map[Direction]string{In: "inbound", Out: "outbound"}
	switch c {
	case NetworkACL:
		return []string{"side", "rule", "protocol", "port range", "source or destination", "when"}, func(_ int, r Rule) [][]string {
			back := map[Direction]string{In: "outbound", Out: "inbound"}[r.Direction]
			there := []string{string(r.Party), bound[r.Direction], r.Protocol, r.ports("–"), r.peers(all), r.When}
			return [][]string{there, {"", back + ", its answers", r.Protocol, "1024–65535", r.peers(all), r.When}}
		}
	case Azure:
		return []string{"side", "priority", "name", "direction", "protocol", "source", "destination", "destination port", "when"}, func(i int, r Rule) [][]string {
			source, destination := "the "+string(r.Party), r.peers("Internet")
			if r.Direction == In {
				source, destination = r.peers("Internet"), source
			}
			return one(string(r.Party), strconv.Itoa(100+10*i), "`"+r.name()+"`", map[Direction]string{In: "Inbound", Out: "Outbound"}[r.Direction], r.Protocol, source, destination, r.ports("-"), r.When)
		}
	case Google:
		return []string{"side", "name", "direction", "allow", "ranges", "target tag", "when"}, func(_ int, r Rule) [][]string {
			allow := "`" + strings.ToLower(r.Protocol) + ":" + r.ports("-") + "`"
			if r.From == 0 {
				allow = r.ports("-")
			}
			return one(string(r.Party), "`"+r.name()+"`", map[Direction]string{In: "INGRESS", Out: "EGRESS"}[r.Direction], allow, r.peers(all), "`culvert-"+string(r.Party)+"`", r.When)
		}
	}
	return []string{"side", "rule", "protocol", "port range", "source or destination", "when"}, func(_ int, r Rule) [][]string {
		return one(string(r.Party), bound[r.Direction], r.Protocol, r.ports("–"), r.peers(all), r.When)
	}
}
