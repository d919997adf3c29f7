package lab

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rules collects nftables rules and commits them in one transaction, in the namespace of the calling thread.
type rules struct {
	conn   *nftables.Conn
	nat    *nftables.Table // IPv4 alone
	filter *nftables.Table // both families
	public netip.Addr      // of the NAT that the rules are for, if any
	lan    netip.Prefix    // what is behind it
	sets   uint32          // made so far
	err    error           // the first mistake
}

// Names of sets.
const (
	setNoted  = "noted"  // address and port: where a port behind the NAT has sent to
	setExempt = "exempt" // addresses that may pass a firewall
	setApart  = "apart"  // pairs of addresses between which nothing passes
)

func newRules() (*rules, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return &rules{
		conn:   conn,
		nat:    conn.AddTable(&nftables.Table{Name: "lab-nat", Family: nftables.TableFamilyIPv4}),
		filter: conn.AddTable(&nftables.Table{Name: "lab-filter", Family: nftables.TableFamilyINet}),
	}, nil
}

func (r *rules) commit() error {
	if r.err != nil {
		return r.err
	}
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("set nftables rules: %w", err)
	}
	return nil
}

func (r *rules) masquerade()       { r.mapWith(&expr.Masq{}) }
func (r *rules) masqueradeRandom() { r.mapWith(&expr.Masq{FullyRandom: true}) }

// masqueradeRange gives every UDP flow a random port between first and last.
func (r *rules) masqueradeRange(first, last uint16) {
	r.add(r.out(), from(r.lan), outward, udp, []expr.Any{
		&expr.Immediate{Register: 1, Data: r.public.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(first)},
		&expr.Immediate{Register: 3, Data: binaryutil.BigEndian.PutUint16(last)},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4,
			RegAddrMin: 1, RegProtoMin: 2, RegProtoMax: 3, FullyRandom: true},
	})
	r.masquerade()
}

// mapWith maps the private addresses behind the NAT.
func (r *rules) mapWith(masq *expr.Masq) { r.add(r.out(), from(r.lan), outward, []expr.Any{masq}) }

// dropStrangers drops what opens a flow from outside, to the NAT itself and, unless the NAT forwards it, to hosts behind it.
// Without the first, a stranger's packet to the NAT's own address makes a conntrack entry, the next flow outward gets
// another port because of it, and an easy NAT turns hard in the middle of a hole punch.
func (r *rules) dropStrangers() {
	input := r.chain(r.filter, "to-self", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	r.add(input, inward, tracked(expr.CtKeySTATE, expr.CtStateBitNEW|expr.CtStateBitUNTRACKED, some), drop)
	r.add(r.through(), inward, tracked(expr.CtKeySTATE, expr.CtStateBitNEW, some), tracked(expr.CtKeySTATUS, statusForwarded, none), drop)
}

// forwardAll sends every unprivileged UDP port from outside to one host.
func (r *rules) forwardAll(host netip.Addr) {
	r.add(r.in(), inward, udp, unprivileged, forwardTo(host))
}

// noteTargets remembers to which addresses each port behind the NAT has sent UDP.
func (r *rules) noteTargets() {
	noted := r.set(setNoted, r.nat, nftables.TypeIPAddr, nftables.TypeInetService)
	chain := r.chain(r.nat, "note", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityMangle)
	r.add(chain, outward, udp, []expr.Any{
		field(network, offsetTarget, 4, 0), field(transport, offsetSourcePort, 2, 1),
		&expr.Dynset{SrcRegKey: register, SetName: noted.Name, SetID: noted.ID, Operation: unix.NFT_DYNSET_OP_UPDATE},
	})
}

// forwardNoted sends UDP from outside to the host if it comes from an address that the port has sent to.
func (r *rules) forwardNoted(host netip.Addr) {
	r.add(r.in(), inward, udp, []expr.Any{
		field(network, offsetSource, 4, 0), field(transport, offsetTargetPort, 2, 1),
		&expr.Lookup{SourceRegister: register, SetName: setNoted},
	}, forwardTo(host))
}

func (r *rules) onlyTCP() {
	r.add(r.through(), outward, udp, drop)
	r.add(r.through(), inward, udp, drop)
}

func (r *rules) onlyHTTPS() {
	r.add(r.through(), outward, tcp, https, accept)
	r.add(r.through(), outward, drop)
}

func (r *rules) onlyProxy() {
	exempt := r.set(setExempt, r.filter, nftables.TypeIPAddr)
	r.add(r.through(), outward, ipv4, []expr.Any{
		field(network, offsetSource, 4, 0), &expr.Lookup{SourceRegister: register, SetName: exempt.Name, SetID: exempt.ID},
	}, tcp, https, accept)
	r.add(r.through(), outward, drop)
}

// exempt lets a proxy out where [OnlyProxy] is in force.
func (r *rules) exempt(proxy netip.Addr) {
	set := &nftables.Set{Table: r.filter, Name: setExempt, KeyType: nftables.TypeIPAddr}
	r.note(r.conn.SetAddElements(set, []nftables.SetElement{{Key: proxy.AsSlice()}}))
}

// clampMSS makes TCP connections through the router fit an MTU, as every router on such a link does (RFC 4821, section 1).
func (r *rules) clampMSS(mtu uint16) {
	mss := binaryutil.BigEndian.PutUint16(mtu - 60) // headers of IPv6 and TCP
	const optMSS, value = 2, 2                      // kind, and where the value starts (RFC 9293, section 3.2)
	chain := r.chain(r.filter, "clamp", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityMangle)
	r.add(chain, tcp, []expr.Any{
		field(transport, 13, 1, 0),
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{2}, Xor: []byte{0}}, // SYN
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: []byte{0}},
		&expr.Exthdr{DestRegister: register, Type: optMSS, Offset: value, Len: 2, Op: expr.ExthdrOpTcpopt},
		&expr.Cmp{Op: expr.CmpOpGt, Register: register, Data: mss},
		&expr.Immediate{Register: register, Data: mss},
		&expr.Exthdr{SourceRegister: register, Type: optMSS, Offset: value, Len: 2, Op: expr.ExthdrOpTcpopt},
	})
}

// muteTooBig keeps the router from telling anybody that a packet was too big, so that a smaller link is a black hole.
func (r *rules) muteTooBig() {
	chain := r.chain(r.filter, "mute", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	first := func(bytes ...byte) []expr.Any {
		return []expr.Any{field(transport, 0, uint32(len(bytes)), 0), &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: bytes}}
	}
	r.add(chain, protocol(unix.IPPROTO_ICMP), first(3, 4), drop) // RFC 1191
	r.add(chain, protocol(unix.IPPROTO_ICMPV6), first(2), drop)  // RFC 4443, section 3.2
}

// keepApart drops what goes between the pairs in a set.
func (r *rules) keepApart() {
	apart := r.set(setApart, r.filter, nftables.TypeIPAddr, nftables.TypeIPAddr)
	r.add(r.through(), ipv4, []expr.Any{
		field(network, offsetSource, 4, 0), field(network, offsetTarget, 4, 1),
		&expr.Lookup{SourceRegister: register, SetName: apart.Name, SetID: apart.ID},
	}, drop)
}

// setChange adds elements to a set or takes them away.
type setChange func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error

// pair changes that set for both directions between two addresses.
func (r *rules) pair(a, b netip.Addr, change setChange) {
	set := &nftables.Set{Table: r.filter, Name: setApart, KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr)}
	r.note(change(r.conn, set, []nftables.SetElement{
		{Key: append(a.AsSlice(), b.AsSlice()...)}, {Key: append(b.AsSlice(), a.AsSlice()...)},
	}))
}
