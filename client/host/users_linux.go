package host

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tunnels of several users on one host. Every tunnel of a user has its routes twice: in the main table, for root and containers, and in
// one table that is the user's, which nothing reads while the host has one user's tunnels alone. As soon as there are two, a rule for each
// leads this user's programs to their own table first:
//
//	32700: from all lookup 1073742825 uidrange 1001-1001
//
// Routes and tables go with the interfaces. A rule whose interfaces were killed leads to an empty table, which is as if it were not there;
// the next tunnel to begin or to end removes it.
const (
	userTables   = 1 << 30 // and the user's id: the tables
	userPriority = 32700   // before the main table, at 32766, and after what the host has for itself
)

// aliasPrefix begins the alias of a tunnel's interface, before its user's id.
const aliasPrefix = "culvert of user "

func tableOf(user int) int { return userTables | user&(userTables-1) }

// owner is whose tunnel an interface is; ok is false where it is none.
func owner(l netlink.Link) (user int, ok bool) {
	if !strings.HasPrefix(l.Attrs().Name, strings.TrimSuffix(numbered, "%d")) {
		return 0, false
	}
	user, err := strconv.Atoi(strings.TrimPrefix(l.Attrs().Alias, aliasPrefix))
	if err != nil || user < 0 {
		user = 0
	}
	return user, true
}

// settle makes the rules what the tunnels of this host call for.
func settle(nl *netlink.Handle) error {
	links, err := dump(nl.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	users := make(map[int]bool)
	for _, l := range links {
		if user, ok := owner(l); ok {
			users[user] = true
		}
	}
	if len(users) == 1 {
		clear(users)
	}
	delete(users, 0)
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := settleFamily(nl, family, users); err != nil && !(family == netlink.FAMILY_V6 && noIPv6(err)) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func settleFamily(nl *netlink.Handle, family int, users map[int]bool) error {
	have, err := dump(func() ([]netlink.Rule, error) { return nl.RuleList(family) })
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	var errs []error
	there := make(map[int]bool)
	for i := range have {
		user, ok := ours(&have[i])
		if !ok {
			continue
		}
		if there[user] = users[user]; there[user] {
			continue
		}
		if err := nl.RuleDel(ruleOf(family, user)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove the routing rule of user %d: %w", user, err))
		}
	}
	for user := range users {
		if there[user] {
			continue
		}
		if err := nl.RuleAdd(ruleOf(family, user)); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("add a routing rule for user %d: %w", user, err))
		}
	}
	return errors.Join(errs...)
}

func ruleOf(family, user int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = family, userPriority, tableOf(user)
	r.UIDRange = netlink.NewRuleUIDRange(uint32(user), uint32(user))
	return r
}

// ours tells the user of a rule that a tunnel has made.
func ours(r *netlink.Rule) (user int, ok bool) {
	if r.Priority != userPriority || r.UIDRange == nil || r.UIDRange.Start != r.UIDRange.End {
		return 0, false
	}
	user = int(r.UIDRange.Start)
	return user, r.Table == tableOf(user)
}

// loosen has the interface take what comes back to a user whose own route leads here while the main table's leads elsewhere: a strict
// reverse path filter (RFC 3704, section 2.2) looks at the main table alone. The higher of both settings counts.
func loosen(name string) {
	const strict, loose = "1", "2"
	for _, of := range []string{"all", name} {
		if text, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + of + "/rp_filter"); err == nil && strings.TrimSpace(string(text)) == strict {
			_ = os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/rp_filter", []byte(loose), 0)
		}
	}
}
