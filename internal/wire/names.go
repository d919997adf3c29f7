package wire

import "net/netip"

// DNSPort is where a gateway answers DNS inside the tunnel, on its overlay addresses, over UDP and TCP (RFC 1035).
const DNSPort = 53

// MaxNames bounds the names that one session may be granted: a gateway tells its client no more.
const MaxNames = 4096

// Names tells a client which names it may ask its gateway for. All other names are none of the tunnel's business: a
// resolver must never send them there, and the gateway would refuse them.
type Names struct {
	// Servers answer for the names below and refuse all others: the gateway's overlay addresses, on [DNSPort].
	Servers []netip.Addr `json:"servers"`
	// Exact are granted names, lower case, without a final dot.
	Exact []string `json:"exact,omitempty"`
	// Suffixes are granted with everything below them but not themselves: "svc.corp" stands for *.svc.corp.
	Suffixes []string `json:"suffixes,omitempty"`
	// Services are the ranges that the servers answer from. The gateway's routes hold them as well; here they tell a client
	// that asks on a host's behalf which answers to believe: an address outside is not the gateway's to give.
	Services []netip.Prefix `json:"services"`
}
