package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ownMark is the mark of the forwarder's own queries, which are not redirected to it again: "clvt".
const ownMark = 0x636c7674

// tableOwner makes a table belong to the netlink socket that made it: nobody else may change it, and the kernel removes it with
// the socket (NFT_TABLE_F_OWNER in linux/netfilter/nf_tables.h, since Linux 5.12).
const tableOwner = 2

// natStatus is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h: the connection was redirected.
const natStatus = 1 << 5

// redirect is the forwarder with the nftables table that brings queries to it.
type redirect struct {
	forwarder *forwarder
	conn      *netlink.Conn
}

func (*redirect) name() string { return "nftables" }

// close removes the table first, so that no query finds nobody.
func (r *redirect) close() error {
	err := r.conn.Close()
	r.forwarder.close()
	return err
}

// startRedirect redirects containers' queries, and the host's own where no other mechanism serves it.
func startRedirect(ctx context.Context, opts Options, s *scope, has func(string) bool) (mechanism, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: open nftables: %w", errUnsupported, err)
	}
	f := &forwarder{scope: s, upstream: systemServers(resolverFiles), control: markOwn, log: opts.Logger}
	if err := startForwarder(ctx, "[::]:0", f); err != nil {
		conn.Close()
		return nil, err
	}
	r := &redirect{forwarder: f, conn: conn}
	t := table{name: "culvert_" + opts.Interface, port: f.port(), servers: s.servers, host: !has("systemd-resolved")}
	if err := t.create(conn); err != nil {
		_ = r.close()
		if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("%w: redirect dns: %w", errUnsupported, err)
		}
		return nil, fmt.Errorf("redirect dns: %w", err)
	}
	return r, nil
}

// markOwn marks a socket of the forwarder.
func markOwn(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
	return errors.Join(err, failed)
}

// table is the ruleset, in nft's words:
//
//	table inet culvert_IF {
//	    flags owner
//	    chain containers { type nat hook prerouting priority dstnat
//	        meta iifkind "bridge" [daddr a server → return]  udp,tcp dport 53 redirect to :PORT }
//	    chain host { type nat hook output priority -100         # only where nothing else serves the host
//	        meta mark OWN return  [daddr a server → return]  udp,tcp dport 53 redirect to :PORT }
//	    chain direct { type filter hook input priority filter  # the port serves redirected queries only
//	        udp,tcp dport PORT ct status & dnat == 0 drop }
//	}
type table struct {
	name    string
	port    uint16
	servers []netip.Addr
	host    bool
}

// create makes the table on conn's socket, whole or not at all.
func (t table) create(conn *netlink.Conn) error {
	b := &batch{family: unix.NFPROTO_INET}
	b.begin()
	b.add(unix.NFT_MSG_NEWTABLE, str(unix.NFTA_TABLE_NAME, t.name), be32(unix.NFTA_TABLE_FLAGS, tableOwner))
	b.chain(t.name, "containers", "nat", unix.NF_INET_PRE_ROUTING, -100)
	t.redirects(b, "containers", ifKind("bridge"))
	if t.host {
		b.chain(t.name, "host", "nat", unix.NF_INET_LOCAL_OUT, -100)
		b.rule(t.name, "host", append(loadMeta(expr.MetaKeyMARK), equal(binaryutil.NativeEndian.PutUint32(ownMark)), verdict(expr.VerdictReturn)))
		t.redirects(b, "host", nil)
	}
	b.chain(t.name, "direct", "filter", unix.NF_INET_LOCAL_IN, 0)
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		b.rule(t.name, "direct", append(append(toPort(proto, t.port),
			&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(natStatus), Xor: make([]byte, 4)}),
			equal(make([]byte, 4)), verdict(expr.VerdictDrop)))
	}
	b.end()
	if b.err != nil {
		return b.err
	}
	return b.run(conn)
}

// redirects adds what brings DNS to the forwarder; where says which packets of the chain.
func (t table) redirects(b *batch, chain string, where []expr.Any) {
	for _, server := range t.servers {
		b.rule(t.name, chain, append(toAddr(server), verdict(expr.VerdictReturn)))
	}
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		rule := append(append([]expr.Any{}, where...), toPort(proto, 53)...)
		b.rule(t.name, chain, append(rule,
			&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, t.port)},
			&expr.Redir{RegisterProtoMin: 1}))
	}
}

func loadMeta(key expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: key, Register: 1}} }

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func verdict(kind expr.VerdictKind) expr.Any { return &expr.Verdict{Kind: kind} }

// metaIIFKind is NFT_META_IIFKIND of linux/netfilter/nf_tables.h: the kind of the interface that a packet came in on.
const metaIIFKind = 26

func ifKind(kind string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, kind)
	return append(loadMeta(metaIIFKind), equal(name))
}

func toPort(proto byte, port uint16) []expr.Any {
	return append(loadMeta(expr.MetaKeyL4PROTO), equal([]byte{proto}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		equal(binary.BigEndian.AppendUint16(nil, port)))
}

func toAddr(addr netip.Addr) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16)
	if addr.Is6() {
		family, offset = unix.NFPROTO_IPV6, 24
	}
	return append(loadMeta(expr.MetaKeyNFPROTO), equal([]byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(addr.AsSlice()))},
		equal(addr.AsSlice()))
}
