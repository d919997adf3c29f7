package policy

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/net/publicsuffix"
)

// written are ports behind which data or machines can be changed, and by what name people know them.
var written = map[uint16]string{
	21: "FTP", 22: "SSH", 23: "Telnet", 25: "SMTP", 389: "LDAP", 445: "SMB", 465: "SMTP", 587: "SMTP", 636: "LDAP", 873: "rsync",
	1433: "SQL Server", 1521: "Oracle", 2049: "NFS", 2375: "Docker", 2376: "Docker", 2379: "etcd", 3306: "MySQL", 3389: "RDP",
	4222: "NATS", 5000: "a container registry", 5432: "PostgreSQL", 5671: "AMQP", 5672: "AMQP", 5985: "WinRM", 5986: "WinRM",
	6379: "Redis", 6443: "the Kubernetes API", 8200: "Vault", 8500: "Consul", 9042: "Cassandra", 9092: "Kafka",
	9200: "Elasticsearch", 11211: "memcached", 26257: "CockroachDB", 27017: "MongoDB", 50000: "Db2",
}

// writes gives the first of a line's ports behind which something can be written.
func (l *line) writes() (what string, ok bool) {
	if l.internet || l.protos&(TCP|UDP) == 0 {
		return "", false
	}
	if hasPort(l.ports, 1) && hasPort(l.ports, 65535) {
		return "every port", true
	}
	var found []uint16
	for port := range written {
		if hasPort(l.ports, port) {
			found = append(found, port)
		}
	}
	if len(found) == 0 {
		return "", false
	}
	port := slices.Min(found)
	return fmt.Sprintf("%s on port %d", written[port], port), true
}

// pullRequests looks at what the code of a pull request, which nobody has reviewed yet, may reach.
func (x *ruleLint) pullRequests() {
	var spelt string
	x.some(func(w *way) bool {
		for _, e := range explicitEvents {
			if len(w.events) > 0 && !slices.ContainsFunc(w.events, func(list []string) bool { return !slices.Contains(list, e) }) {
				spelt = e
			}
		}
		return spelt != ""
	})
	if spelt != "" {
		x.warn(StrangerInput, x.at(claimEvent), fmt.Sprintf("rule %q admits %s, which runs with the base repository's rights on a stranger's input", x.r.name, spelt),
			"let a job without rights look at the input, and match on push or workflow_dispatch here")
	}
	implied := x.some(func(w *way) bool { return !w.has(claimEvent) })
	pulled := x.some(func(w *way) bool {
		return w.takes(claimEvent, "pull_request") && w.takes("ref", "refs/pull/1/merge")
	})
	if spelt == "" && !pulled {
		return
	}
	for i := range x.r.grants {
		l, err := parseLine(x.r.grants[i].Allow)
		if err != nil {
			continue
		}
		if what, ok := l.writes(); ok {
			next := "take pull_request out of event_name, or give pull requests a rule and a target of their own"
			if implied {
				next = "say event_name, such as [push, workflow_dispatch], or a ref such as refs/heads/main"
			}
			x.warn(PullRequestWrites, x.at(claimEvent), fmt.Sprintf("rule %q lets pull requests, which nobody has reviewed, reach %q: %s", x.r.name, x.r.grants[i].Allow, what), next)
			return
		}
	}
}

// lines looks at what the rule opens.
func (x *ruleLint) lines() {
	for i := range x.r.grants {
		g := &x.r.grants[i]
		path := x.path + ".targets"
		if j := slices.IndexFunc(x.in.Allow, func(s string) bool { return strings.TrimSpace(s) == g.Allow }); j >= 0 {
			path = fmt.Sprintf("%s.allow[%d]", x.path, j)
		}
		if g.Observe != "" {
			continue
		}
		l, err := parseLine(g.Allow)
		if err != nil {
			continue
		}
		if l.wide() {
			x.warn(WideTarget, path, fmt.Sprintf("rule %q opens %q, which is very much", x.r.name, g.Allow), "name the hosts and ports that the jobs need")
		}
		if l.host.public() {
			x.warn(PublicWildcard, path, fmt.Sprintf("anybody can register a name below %s and point it at any address inside", l.host.name), "name a domain of your own")
		}
	}
	if len(x.in.Observe) > 0 {
		x.warn(Observes, x.path+".observe", fmt.Sprintf("rule %q observes: every flow to these ranges is let through", x.r.name), "write what the record shows into allow, and remove observe")
	}
}

func (l *line) wide() bool {
	all := hasPort(l.ports, 1) && hasPort(l.ports, 65535)
	switch {
	case l.internet:
		return all
	case l.host.name != "":
		return false
	case l.prefix.Addr().Is4():
		return l.prefix.Bits() <= wideBits4 || all && l.prefix.Bits() <= wideAny4
	}
	return l.prefix.Bits() <= wideBits6 || all && l.prefix.Bits() <= wideAny6
}

// public tells whether strangers can register names that a wildcard stands for: below a top-level domain of the public
// DNS, or below a domain that hands out names, such as github.io (Public Suffix List).
func (h hostName) public() bool {
	if !h.wild {
		return false
	}
	suffix, icann := publicsuffix.PublicSuffix(h.name)
	return suffix == h.name && (icann || strings.Contains(suffix, "."))
}
