package nat

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
)

// ProbeFiltering finds out how the NAT filters what comes back, with two sockets that have not sent anything yet and are not
// used again. Servers answer the first as usual and the second from another port (RFC 5780, section 4.4). Servers that do
// not know CHANGE-REQUEST tell nothing: where there is no other, the result is [DependenceUnknown]. Where the answer comes
// through, it is [AddressDependent] although the NAT may filter even less: the server's other port is at the same address.
// It waits until ctx ends where nothing comes through.
func ProbeFiltering(ctx context.Context, usual, changed net.PacketConn, servers []netip.AddrPort) (Dependence, error) {
	var asUsual, elsewhere []Question
	for _, s := range servers {
		asUsual = append(asUsual, Question{Server: s, Request: func(id TxID) []byte { return ChangeRequest(id, false) }})
		elsewhere = append(elsewhere, Question{Server: s, Request: func(id TxID) []byte { return ChangeRequest(id, true) }, Elsewhere: true})
	}
	until, enough := context.WithCancel(ctx)
	defer enough()
	var first, second []Answer
	var errs [2]error
	var wg sync.WaitGroup
	wg.Go(func() { first, errs[0] = Ask(until, usual, asUsual) })
	wg.Go(func() {
		defer enough()
		second, errs[1] = AskAny(ctx, changed, elsewhere)
	})
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return DependenceUnknown, err
	}
	return filtering(first, second), nil
}

// filtering judges, server by server, what came to the usual socket and to the other.
func filtering(usual, changed []Answer) Dependence {
	result := DependenceUnknown
	for i, a := range changed {
		switch {
		case !a.Mapped.IsValid():
			ignores := a.From.IsValid() // the wish to change, and answers as if there were none
			if usual[i].Mapped.IsValid() && !ignores && result == DependenceUnknown {
				result = AddressAndPortDependent
			}
		case a.From.Addr() != a.Server.Addr():
			return EndpointIndependent
		default:
			result = AddressDependent
		}
	}
	return result
}
