package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/client/nft"
)

// Marks of forwarders' own queries. A query that a tunnel's forwarder passes on must not come back to it, but may have to go to the
// forwarder of another tunnel of the same job: so a mark tells whose query it is and by which tunnel's forwarder it was passed on, and
// each table takes those of tunnels with higher numbers than its own. Fresh queries come to the highest number first.
//
//	0x63 | whose: 0 anybody's, else made of the user's id (16 bits) | number of the tunnel's interface (8 bits)
const (
	markBase   = 0x63 << 24
	markBits   = 0xff << 24
	whoseBits  = 0xffff << 8
	numberBits = 0xff
	anybody    = 0
)

// whose is a user in a mark.
func whose(user int) uint32 {
	if user == 0 {
		return anybody
	}
	return uint32(1+user%0xffff) << 8
}

// number is the number of a tunnel's interface; names of another kind have none.
func number(name string) uint32 {
	digits := strings.TrimLeft(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.")
	n, _ := strconv.ParseUint(digits, 10, 31)
	return uint32(min(n, maxNumber))
}

// maxNumber keeps priorities between those of connection tracking, -200, and of destination NAT, -100 (linux/netfilter_ipv4.h).
const maxNumber = 99

// natStatus is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h: the connection was redirected.
const natStatus = 1 << 5

// redirect is the forwarders with the nftables table that brings queries to them.
type redirect struct {
	forwarders []*forwarder
	table      *nft.Table
}

func (*redirect) name() string { return "nftables" }

// close removes the table first, so that no query finds nobody.
func (r *redirect) close() error {
	var err error
	if r.table != nil {
		err = r.table.Close()
	}
	for _, f := range r.forwarders {
		f.close()
	}
	return err
}

// serve starts a forwarder for queries that are whose's, and gives its port.
func (r *redirect) serve(ctx context.Context, opts Options, s *scope, whose uint32) (uint16, error) {
	f := &forwarder{scope: s, upstream: systemServers(resolverFiles), log: opts.Logger,
		control: mark(markBase | whose | number(opts.Interface)), inside: over(opts.Interface)}
	if err := startForwarder(ctx, "[::]:0", f); err != nil {
		return 0, err
	}
	r.forwarders = append(r.forwarders, f)
	return f.port(), nil
}

// startRedirect redirects containers' queries, and the host's own where no other mechanism serves it.
func startRedirect(ctx context.Context, opts Options, s *scope, has func(string) bool) (mechanism, error) {
	r := &redirect{}
	t := rules{number: number(opts.Interface), servers: s.servers, host: !has("systemd-resolved"), user: opts.User}
	var err error
	if t.port, err = r.serve(ctx, opts, s, anybody); err == nil && t.user > 0 && t.host {
		t.userPort, err = r.serve(ctx, opts, s, whose(t.user))
	}
	if err == nil {
		r.table, err = nft.Create("culvert_"+opts.Interface, t.fill)
	}
	if errors.Is(err, nft.ErrUnsupported) { // as in kernels without nft_fib
		t.all = true
		r.table, err = nft.Create("culvert_"+opts.Interface, t.fill)
	}
	if err == nil {
		return r, nil
	}
	_ = r.close()
	if errors.Is(err, nft.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", errUnsupported, err)
	}
	return nil, fmt.Errorf("redirect dns: %w", err)
}

// mark marks a socket of a forwarder.
func mark(mark uint32) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)) })
		return errors.Join(err, failed)
	}
}

// over has a socket use this interface, because other networks' gateways have the same addresses, and has no table take what it asks.
func over(name string) func(_, _ string, c syscall.RawConn) error {
	final := mark(markBase | anybody) // of number 0, which is above no other
	return func(network, address string, c syscall.RawConn) error {
		err := c.Control(func(fd uintptr) { _ = unix.BindToDevice(int(fd), name) }) // without it the routes decide
		return errors.Join(err, final(network, address, c))
	}
}

// rules are the ruleset, in nft's words, for the tunnel with number N:
//
//	table inet culvert_IF {
//	    flags owner
//	    chain containers { type nat hook prerouting priority dstnat - N
//	        fib daddr type local return                            # a server of this host's, as podman's networks have for their own names
//	        [daddr a server → return]
//	        meta iifkind "bridge"  udp,tcp dport 53 redirect to :PORT }
//	    chain host { type nat hook output priority -100 - N
//	        [daddr a server → return]
//	        meta mark & (0xff000000 | WHOSE) == OWN  meta mark & 0xff > N  udp,tcp dport 53 redirect to :PORT
//	        meta mark & 0xff000000 == OWN return
//	        udp,tcp dport 53 redirect to :PORT }                   # only where nothing else serves the host
//	    chain direct { type filter hook input priority filter      # the port serves redirected queries only
//	        udp,tcp dport PORT ct status & dnat == 0 drop }
//	}
//
// A tunnel that is one user's has a second port for that user's queries, the last rule but one once more for it, and in the last rule
// "meta skuid USER … USERPORT" and "meta skuid < 1000 … PORT".
type rules struct {
	number   uint32
	port     uint16
	userPort uint16 // 0 where the tunnel is everybody's
	user     int
	servers  []netip.Addr
	host     bool
	all      bool // take containers' queries to this host, too
}

func (t rules) fill(b *nft.Batch) {
	b.Chain("containers", "nat", unix.NF_INET_PRE_ROUTING, t.priority())
	if !t.all {
		b.Rule("containers", toThisHost(), nft.Verdict(expr.VerdictReturn))
	}
	t.past(b, "containers")
	redirects(b, "containers", t.port, nft.Meta(metaIIFKind, nft.InterfaceName("bridge")))
	b.Chain("host", "nat", unix.NF_INET_LOCAL_OUT, t.priority())
	t.past(b, "host")
	t.passedOn(b)
	if t.host {
		t.fresh(b)
	}
	b.Chain("direct", "filter", unix.NF_INET_LOCAL_IN, 0)
	for _, port := range slices.DeleteFunc([]uint16{t.port, t.userPort}, func(port uint16) bool { return port == 0 }) {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			b.Rule("direct", toPort(proto, port), nft.Tracked(expr.CtKeySTATUS, natStatus), nft.Verdict(expr.VerdictDrop))
		}
	}
}

func (t rules) priority() int { return -100 - int(t.number) }

// past lets the queries to a gateway's own server by.
func (t rules) past(b *nft.Batch, chain string) {
	for _, server := range t.servers {
		b.Rule(chain, toAddr(server), nft.Verdict(expr.VerdictReturn))
	}
}

// passedOn takes what forwarders of higher tunnels have passed on.
func (t rules) passedOn(b *nft.Batch) {
	redirects(b, "host", t.port, nft.Marked(markBits|whoseBits, markBase|anybody), nft.MarkAbove(numberBits, t.number))
	if t.userPort != 0 {
		redirects(b, "host", t.userPort, nft.Marked(markBits|whoseBits, markBase|whose(t.user)), nft.MarkAbove(numberBits, t.number))
	}
	b.Rule("host", nft.Marked(markBits, markBase), nft.Verdict(expr.VerdictReturn))
}

// fresh takes what programs of the host ask.
func (t rules) fresh(b *nft.Batch) {
	if t.userPort == 0 {
		redirects(b, "host", t.port)
		return
	}
	redirects(b, "host", t.userPort, nft.User(t.user))
	redirects(b, "host", t.port, nft.UserBelow(ordinary))
}

// ordinary is the first user id that people and runners have (login.defs(5), UID_MIN).
const ordinary = 1000

// redirects adds what brings DNS to a forwarder; where says which packets of the chain.
func redirects(b *nft.Batch, chain string, port uint16, where ...[]expr.Any) {
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		b.Rule(chain, slices.Concat(where...), toPort(proto, 53), []expr.Any{
			&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
			&expr.Redir{RegisterProtoMin: 1},
		})
	}
}

// metaIIFKind is NFT_META_IIFKIND of linux/netfilter/nf_tables.h: the kind of the interface that a packet came in on.
const metaIIFKind = 26

// toThisHost is for packets to an address of this host's. What a server here cannot answer itself it asks for as a program of the host.
func toThisHost() []expr.Any {
	return []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, nft.Equal(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL))}
}

func toPort(proto byte, port uint16) []expr.Any {
	return append(nft.Meta(expr.MetaKeyL4PROTO, []byte{proto}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		nft.Equal(binary.BigEndian.AppendUint16(nil, port)))
}

func toAddr(addr netip.Addr) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16)
	if addr.Is6() {
		family, offset = unix.NFPROTO_IPV6, 24
	}
	return append(nft.Meta(expr.MetaKeyNFPROTO, []byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(addr.AsSlice()))},
		nft.Equal(addr.AsSlice()))
}
