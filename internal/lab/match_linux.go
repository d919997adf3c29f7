package lab

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What rules are made of: chains, sets, matches and verdicts.

func (r *rules) out() *nftables.Chain {
	return r.chain(r.nat, "out", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
}

func (r *rules) in() *nftables.Chain {
	return r.chain(r.nat, "in", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
}

func (r *rules) through() *nftables.Chain {
	return r.chain(r.filter, "through", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
}

func (r *rules) chain(table *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook,
	prio *nftables.ChainPriority) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: kind, Hooknum: hook, Priority: prio})
}

func (r *rules) add(chain *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: all})
}

// set makes a set of values, or of values put together. Its id is of this transaction alone, and chosen here: the library
// would count in a variable that all goroutines share without a lock.
func (r *rules) set(name string, table *nftables.Table, types ...nftables.SetDatatype) *nftables.Set {
	r.sets++
	set := &nftables.Set{Table: table, Name: name, ID: r.sets, KeyType: types[0], Dynamic: name == setNoted}
	if len(types) > 1 {
		set.Concatenation = true
		set.KeyType = nftables.MustConcatSetType(types...)
	}
	r.note(r.conn.AddSet(set, nil))
	return set
}

// note keeps the first error.
func (r *rules) note(err error) {
	if r.err == nil {
		r.err = err
	}
}

// register is where a match starts. A second field of four bytes goes into the next slot, see [field].
const register = unix.NFT_REG_1

// Headers, and offsets of fields in them, in bytes (RFC 791, section 3.1; RFC 768).
const (
	network   = expr.PayloadBaseNetworkHeader
	transport = expr.PayloadBaseTransportHeader

	offsetSource     = 12
	offsetTarget     = 16
	offsetSourcePort = 0
	offsetTargetPort = 2
)

// field loads a part of a header into one of the four-byte slots that [register] is made of.
func field(base expr.PayloadBase, offset, length uint32, slot uint32) *expr.Payload {
	return &expr.Payload{DestRegister: unix.NFT_REG32_00 + slot, Base: base, Offset: offset, Len: length}
}

var (
	drop   = []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	accept = []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}

	inward  = iface(expr.MetaKeyIIFNAME)
	outward = iface(expr.MetaKeyOIFNAME)

	udp  = protocol(unix.IPPROTO_UDP)
	tcp  = protocol(unix.IPPROTO_TCP)
	ipv4 = []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{unix.NFPROTO_IPV4}},
	}

	https        = port(expr.CmpOpEq, 443)
	unprivileged = port(expr.CmpOpGte, 1024)
)

func protocol(number byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{number}},
	}
}

// port compares the port that a packet is for.
func port(op expr.CmpOp, number uint16) []expr.Any {
	return []expr.Any{
		field(transport, offsetTargetPort, 2, 0),
		&expr.Cmp{Op: op, Register: register, Data: binaryutil.BigEndian.PutUint16(number)},
	}
}

// from matches an IPv4 packet's source.
func from(prefix netip.Prefix) []expr.Any {
	mask := netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), prefix.Bits()).Masked().Addr()
	return []expr.Any{
		field(network, offsetSource, 4, 0),
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: mask.AsSlice(), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: prefix.Masked().Addr().AsSlice()},
	}
}

// iface matches packets whose in or out interface is the one towards the internet.
func iface(key expr.MetaKey) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, wan)
	return []expr.Any{
		&expr.Meta{Key: key, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: name},
	}
}

// statusForwarded is conntrack's bit for a flow whose target was rewritten (IPS_DST_NAT).
const statusForwarded = 1 << 5

// What [tracked] wants of the bits.
const (
	some = expr.CmpOpNeq
	none = expr.CmpOpEq
)

// tracked matches packets by conntrack's bits.
func tracked(key expr.CtKey, bits uint32, want expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: register, Key: key},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: want, Register: register, Data: make([]byte, 4)},
	}
}

// forwardTo sends a packet to a host behind the NAT.
func forwardTo(host netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: register, Data: host.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: register},
	}
}
