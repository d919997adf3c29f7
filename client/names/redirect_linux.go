package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/client/nft"
)

// ownMark is the mark of the forwarder's own queries, which are not redirected to it again: "clvt".
const ownMark = 0x636c7674

// natStatus is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h: the connection was redirected.
const natStatus = 1 << 5

// redirect is the forwarder with the nftables table that brings queries to it.
type redirect struct {
	forwarder *forwarder
	table     *nft.Table
}

func (*redirect) name() string { return "nftables" }

// close removes the table first, so that no query finds nobody.
func (r *redirect) close() error {
	err := r.table.Close()
	r.forwarder.close()
	return err
}

// startRedirect redirects containers' queries, and the host's own where no other mechanism serves it.
func startRedirect(ctx context.Context, opts Options, s *scope, has func(string) bool) (mechanism, error) {
	f := &forwarder{scope: s, upstream: systemServers(resolverFiles), control: markOwn, log: opts.Logger}
	if err := startForwarder(ctx, "[::]:0", f); err != nil {
		return nil, err
	}
	t := rules{port: f.port(), servers: s.servers, host: !has("systemd-resolved")}
	made, err := nft.Create("culvert_"+opts.Interface, t.fill)
	if errors.Is(err, nft.ErrUnsupported) { // as in kernels without nft_fib
		t.all = true
		made, err = nft.Create("culvert_"+opts.Interface, t.fill)
	}
	if err == nil {
		return &redirect{forwarder: f, table: made}, nil
	}
	f.close()
	if errors.Is(err, nft.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", errUnsupported, err)
	}
	return nil, fmt.Errorf("redirect dns: %w", err)
}

// markOwn marks a socket of the forwarder.
func markOwn(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
	return errors.Join(err, failed)
}

// rules are the ruleset, in nft's words:
//
//	table inet culvert_IF {
//	    flags owner
//	    chain containers { type nat hook prerouting priority dstnat
//	        fib daddr type local return                            # a server of this host's, as podman's networks have for their own names
//	        meta iifkind "bridge" [daddr a server → return]  udp,tcp dport 53 redirect to :PORT }
//	    chain host { type nat hook output priority -100         # only where nothing else serves the host
//	        meta mark OWN return  [daddr a server → return]  udp,tcp dport 53 redirect to :PORT }
//	    chain direct { type filter hook input priority filter  # the port serves redirected queries only
//	        udp,tcp dport PORT ct status & dnat == 0 drop }
//	}
type rules struct {
	port    uint16
	servers []netip.Addr
	host    bool
	all     bool // take containers' queries to this host, too
}

func (t rules) fill(b *nft.Batch) {
	b.Chain("containers", "nat", unix.NF_INET_PRE_ROUTING, -100)
	if !t.all {
		b.Rule("containers", toThisHost(), nft.Verdict(expr.VerdictReturn))
	}
	t.redirects(b, "containers", nft.Meta(metaIIFKind, nft.InterfaceName("bridge")))
	if t.host {
		b.Chain("host", "nat", unix.NF_INET_LOCAL_OUT, -100)
		b.Rule("host", nft.Meta(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(ownMark)), nft.Verdict(expr.VerdictReturn))
		t.redirects(b, "host", nil)
	}
	b.Chain("direct", "filter", unix.NF_INET_LOCAL_IN, 0)
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		b.Rule("direct", toPort(proto, t.port), nft.Tracked(expr.CtKeySTATUS, natStatus), nft.Verdict(expr.VerdictDrop))
	}
}

// redirects adds what brings DNS to the forwarder; where says which packets of the chain.
func (t rules) redirects(b *nft.Batch, chain string, where []expr.Any) {
	for _, server := range t.servers {
		b.Rule(chain, toAddr(server), nft.Verdict(expr.VerdictReturn))
	}
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		b.Rule(chain, where, toPort(proto, 53), []expr.Any{
			&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, t.port)},
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
