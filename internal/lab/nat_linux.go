package lab

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const wan = "wan" // a NAT's interface towards the internet

// NATOptions describe a NAT. The zero value is [Easy] on a plain link.
type NATOptions struct {
	Kind     Kind
	BlockUDP bool // forward no UDP, either way
	Link     Link // towards the internet
}

// NAT is a router that hides the hosts behind it.
type NAT struct {
	net    *Net
	ns     *namespace
	name   string
	kind   Kind
	public netip.Addr
	lan    [2]byte // first two bytes of the private addresses
	hosts  int
}

// Kind is how a NAT maps and filters. Each kind is a list of rules, so that a further one is a line.
type Kind struct {
	name  string
	rules func(*rules)
	first func(*rules, netip.Addr) // further rules once the first host behind it is known
}

// The kinds. A NAT that keeps ports is endpoint-independent in its mapping for as long as ports do not collide (RFC 4787).
var (
	// Open is a full cone for the first host behind it: anybody may send to its mapping.
	Open = Kind{name: "open", rules: (*rules).masquerade, first: (*rules).forwardAll}
	// Easy keeps one mapping for all destinations and filters by address and port.
	Easy = Kind{name: "easy", rules: func(r *rules) { r.masquerade(); r.dropStrangers() }}
	// Hard gives every destination another port (symmetric) and filters by address and port.
	Hard = Kind{name: "hard", rules: func(r *rules) { r.masqueradeRandom(); r.dropStrangers() }}
)

// String is the kind's name.
func (k Kind) String() string { return k.name }

// NAT attaches a NAT to the internet.
func (n *Net) NAT(name string, opts NATOptions) (*NAT, error) {
	if opts.Kind.rules == nil {
		opts.Kind = Easy
	}
	nat, err := n.buildNAT(name, opts)
	if err != nil {
		return nil, fmt.Errorf("build NAT %s: %w", name, err)
	}
	return nat, nil
}

func (n *Net) buildNAT(name string, opts NATOptions) (*NAT, error) {
	ns, err := n.space(true)
	if err != nil {
		return nil, err
	}
	nat := &NAT{net: n, ns: ns, name: name, kind: opts.Kind, lan: n.nextLAN()}
	if nat.public, err = n.attach(ns, wan, opts.Link); err != nil {
		return nil, err
	}
	return nat, ns.do(func() error {
		r, err := newRules()
		if err != nil {
			return err
		}
		if opts.BlockUDP {
			r.dropUDP()
		}
		opts.Kind.rules(r)
		return r.commit()
	})
}

// nextLAN gives each NAT private addresses of its own: 192.168.k.0/24, then 10.20.k.0/24, 10.21.k.0/24 and so on.
func (n *Net) nextLAN() [2]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.nats++
	if n.nats == 1 {
		return [2]byte{192, 168}
	}
	return [2]byte{10, byte(18 + n.nats)}
}

// Public is the address under which hosts behind the NAT appear.
func (t *NAT) Public() netip.Addr { return t.public }

// LAN covers the private addresses behind the NAT.
func (t *NAT) LAN() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{t.lan[0], t.lan[1]}), 16)
}

// attach connects a host to the private side and gives its address.
func (t *NAT) attach(ns *namespace) (netip.Addr, error) {
	t.hosts++
	subnet := [4]byte{t.lan[0], t.lan[1], byte(t.hosts), 0}
	inside := end{ns: t.ns, name: fmt.Sprintf("lan%d", t.hosts), addr: netip.PrefixFrom(offset(subnet, 1), 24)}
	host := end{ns: ns, name: "eth0", addr: netip.PrefixFrom(offset(subnet, 10), 24), via: offset(subnet, 1)}
	if err := vethPair(inside, host); err != nil {
		return netip.Addr{}, err
	}
	if t.hosts > 1 || t.kind.first == nil {
		return host.addr.Addr(), nil
	}
	return host.addr.Addr(), t.ns.do(func() error {
		r, err := newRules()
		if err != nil {
			return err
		}
		t.kind.first(r, host.addr.Addr())
		return r.commit()
	})
}

// rules collects nftables rules and commits them in one transaction, in the namespace of the calling thread.
type rules struct {
	conn  *nftables.Conn
	table *nftables.Table
}

func newRules() (*rules, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	table := conn.AddTable(&nftables.Table{Name: "lab", Family: nftables.TableFamilyIPv4})
	return &rules{conn, table}, nil
}

func (r *rules) commit() error {
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("set nftables rules: %w", err)
	}
	return nil
}

func (r *rules) masquerade()       { r.masqueradeWith(&expr.Masq{}) }
func (r *rules) masqueradeRandom() { r.masqueradeWith(&expr.Masq{FullyRandom: true}) }

func (r *rules) masqueradeWith(masq *expr.Masq) {
	chain := r.chain("out", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	r.rule(chain, iface(expr.MetaKeyOIFNAME), []expr.Any{masq})
}

// dropStrangers drops what opens a flow from outside, to hosts behind the NAT and to the NAT itself. Without the second,
// a stranger's packet to the NAT's own address makes a conntrack entry, the next flow outward gets another port
// because of it, and an easy NAT turns hard in the middle of a hole punch.
func (r *rules) dropStrangers() {
	forward := r.chain("through", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	r.rule(forward, iface(expr.MetaKeyIIFNAME), state(expr.CtStateBitNEW), drop)
	input := r.chain("to-self", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	r.rule(input, iface(expr.MetaKeyIIFNAME), state(expr.CtStateBitNEW|expr.CtStateBitUNTRACKED), drop)
}

// forwardAll sends every unprivileged UDP port from outside to one host.
func (r *rules) forwardAll(host netip.Addr) {
	chain := r.chain("in", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	r.rule(chain, iface(expr.MetaKeyIIFNAME), udp, []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: binaryutil.BigEndian.PutUint16(1024)},
		&expr.Immediate{Register: 1, Data: host.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	})
}

func (r *rules) dropUDP() {
	forward := r.chain("no-udp", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	r.rule(forward, udp, drop)
}

func (r *rules) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Name: name, Table: r.table, Type: kind, Hooknum: hook, Priority: prio})
}

func (r *rules) rule(chain *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: chain, Exprs: all})
}

var (
	drop = []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	udp  = []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
	}
)

// iface matches packets whose in or out interface is the one towards the internet.
func iface(key expr.MetaKey) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, wan)
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
	}
}

// state matches packets in any of these conntrack states.
func state(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
