package names

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// batch is one nftables transaction (NFNL_MSG_BATCH_BEGIN to END of linux/netfilter/nfnetlink.h). The nftables library encodes
// the expressions but cannot set a table's flags, so the messages around them are made here.
type batch struct {
	family   byte
	messages []netlink.Message
	acks     int
	err      error
}

func (b *batch) begin() { b.edge(unix.NFNL_MSG_BATCH_BEGIN) }
func (b *batch) end()   { b.edge(unix.NFNL_MSG_BATCH_END) }

func (b *batch) edge(kind uint16) {
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
		Data:   generic(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES),
	})
}

// generic is struct nfgenmsg: family, version 0, resource id.
func generic(family byte, resource uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
}

func (b *batch) add(kind int, attrs ...netlink.Attribute) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		b.err = fmt.Errorf("encode nftables: %w", err)
		return
	}
	flags := netlink.Request | netlink.Acknowledge | netlink.Create
	if kind == unix.NFT_MSG_NEWTABLE {
		flags |= netlink.Excl
	}
	if kind == unix.NFT_MSG_NEWRULE {
		flags |= netlink.Append
	}
	b.acks++
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: flags},
		Data:   append(generic(b.family, 0), data...),
	})
}

func (b *batch) chain(table, name, kind string, hook, priority int) {
	where := b.nest(unix.NFTA_CHAIN_HOOK, be32(unix.NFTA_HOOK_HOOKNUM, uint32(hook)), be32(unix.NFTA_HOOK_PRIORITY, uint32(int32(priority))))
	b.add(unix.NFT_MSG_NEWCHAIN, str(unix.NFTA_CHAIN_TABLE, table), str(unix.NFTA_CHAIN_NAME, name), where, str(unix.NFTA_CHAIN_TYPE, kind))
}

func (b *batch) rule(table, chain string, exprs []expr.Any) {
	var list []netlink.Attribute
	for _, e := range exprs {
		data, err := expr.Marshal(b.family, e)
		if err != nil {
			b.err = fmt.Errorf("encode nftables: %w", err)
			return
		}
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data})
	}
	b.add(unix.NFT_MSG_NEWRULE, str(unix.NFTA_RULE_TABLE, table), str(unix.NFTA_RULE_CHAIN, chain), b.nest(unix.NFTA_RULE_EXPRESSIONS, list...))
}

func (b *batch) nest(kind uint16, attrs ...netlink.Attribute) netlink.Attribute {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		b.err = fmt.Errorf("encode nftables: %w", err)
	}
	return netlink.Attribute{Type: unix.NLA_F_NESTED | kind, Data: data}
}

func str(kind uint16, text string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(text), 0)}
}

func be32(kind uint16, v uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binary.BigEndian.AppendUint32(nil, v)}
}

// run sends the transaction and reads one answer for each of its parts.
func (b *batch) run(conn *netlink.Conn) error {
	if _, err := conn.SendMessages(b.messages); err != nil {
		return err
	}
	for got := 0; got < b.acks; {
		answers, err := conn.Receive() // an error message comes back as an error
		if err != nil {
			return err
		}
		got += len(answers)
	}
	return nil
}
