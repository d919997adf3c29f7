package host

import (
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/client/nft"
)

// ordinary is the first user id that people and runners have, and services have not (login.defs(5), UID_MIN).
const ordinary = 1000

// shield lets nothing in through the tunnel but answers to what this host has asked for, and forwards nothing else to containers: a
// gateway, hostile or hacked, cannot open a connection to the runner. Where the tunnel is one user's, it lets no other ordinary user of the
// host in from this side; root and services pass, and so do containers' packets, which have no user. It is a table of nftables that dies
// with the process:
//
//	table inet culvert_shield_IF {
//	    flags owner
//	    chain input   { type filter hook input   priority -10;  iifname IF ct state != established,related drop }
//	    chain forward { type filter hook forward priority -10;  iifname IF ct state != established,related drop }
//	    chain output  { type filter hook output priority -10;   oifname IF meta skuid != USER meta skuid >= 1000 reject with icmpx admin-prohibited }
//	}
func shield(name string, user int) (*nft.Table, error) {
	const answers = expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
	table, err := nft.Create("culvert_shield_"+name, func(b *nft.Batch) {
		for chain, hook := range map[string]int{"input": unix.NF_INET_LOCAL_IN, "forward": unix.NF_INET_FORWARD} {
			b.Chain(chain, "filter", hook, -10)
			b.Rule(chain, nft.Meta(expr.MetaKeyIIFNAME, nft.InterfaceName(name)), nft.Tracked(expr.CtKeySTATE, answers), nft.Verdict(expr.VerdictDrop))
		}
		if user > 0 {
			b.Chain("output", "filter", unix.NF_INET_LOCAL_OUT, -10)
			b.Rule("output", nft.Meta(expr.MetaKeyOIFNAME, nft.InterfaceName(name)), nft.OtherUser(user), nft.UserFrom(ordinary), nft.Reject())
		}
	})
	if err != nil {
		return nil, fmt.Errorf("let nothing in through %s unasked: %w", name, err)
	}
	return table, nil
}
