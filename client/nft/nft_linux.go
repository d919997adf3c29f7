package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// tableOwner is NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h.
const tableOwner = 2

// ErrUnsupported says that this machine has no such tables, or that this process may not make them.
var ErrUnsupported = errors.New("no nftables on this machine")

// Table is a table of both families of addresses ("inet").
type Table struct{ conn *netlink.Conn }

// Create makes a table with what fill puts into it, whole or not at all, in the network namespace of the calling thread.
func Create(name string, fill func(*Batch)) (*Table, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: open nftables: %w", ErrUnsupported, err)
	}
	b := &Batch{table: name}
	b.edge(unix.NFNL_MSG_BATCH_BEGIN)
	b.add(unix.NFT_MSG_NEWTABLE, str(unix.NFTA_TABLE_NAME, name), be32(unix.NFTA_TABLE_FLAGS, tableOwner))
	fill(b)
	b.edge(unix.NFNL_MSG_BATCH_END)
	err = b.err
	if err == nil {
		err = b.run(conn)
	}
	if err == nil {
		return &Table{conn}, nil
	}
	_ = conn.Close()
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return nil, err
}

// Close removes the table.
func (t *Table) Close() error { return t.conn.Close() }

// Batch is one transaction (NFNL_MSG_BATCH_BEGIN to END of linux/netfilter/nfnetlink.h). The nftables library encodes
// the expressions but cannot set a table's flags, so the messages around them are made here.
type Batch struct {
	table    string
	messages []netlink.Message
	acks     int
	err      error
}

func (b *Batch) edge(kind uint16) {
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
		Data:   generic(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES),
	})
}

// generic is struct nfgenmsg: family, version 0, resource id.
func generic(family byte, resource uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
}

func (b *Batch) add(kind int, attrs ...netlink.Attribute) {
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
		Data:   append(generic(unix.NFPROTO_INET, 0), data...),
	})
}

// Chain adds a base chain: kind is "filter" or "nat", hook a number of linux/netfilter.h.
func (b *Batch) Chain(name, kind string, hook, priority int) {
	where := b.nest(unix.NFTA_CHAIN_HOOK, be32(unix.NFTA_HOOK_HOOKNUM, uint32(hook)), be32(unix.NFTA_HOOK_PRIORITY, uint32(int32(priority))))
	b.add(unix.NFT_MSG_NEWCHAIN, str(unix.NFTA_CHAIN_TABLE, b.table), str(unix.NFTA_CHAIN_NAME, name), where, str(unix.NFTA_CHAIN_TYPE, kind))
}

// Rule adds a rule to a chain: all parts, one after the other.
func (b *Batch) Rule(chain string, parts ...[]expr.Any) {
	var list []netlink.Attribute
	for _, e := range slices.Concat(parts...) {
		data, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			b.err = fmt.Errorf("encode nftables: %w", err)
			return
		}
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data})
	}
	b.add(unix.NFT_MSG_NEWRULE, str(unix.NFTA_RULE_TABLE, b.table), str(unix.NFTA_RULE_CHAIN, chain), b.nest(unix.NFTA_RULE_EXPRESSIONS, list...))
}

func (b *Batch) nest(kind uint16, attrs ...netlink.Attribute) netlink.Attribute {
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
func (b *Batch) run(conn *netlink.Conn) error {
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

// Meta compares a property of the packet, such as the name of the interface that it came in on.
func Meta(key expr.MetaKey, want []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, Equal(want)}
}

// InterfaceName is a name as rules compare it.
func InterfaceName(name string) []byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return padded
}

// Tracked is for packets none of whose bits of a property of connection tracking are set.
func Tracked(key expr.CtKey, none uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(none), Xor: make([]byte, 4)},
		Equal(make([]byte, 4)),
	}
}

// Marked is for packets with this mark, as far as mask goes.
func Marked(mask, mark uint32) []expr.Any {
	return append(markIn(mask), Equal(binaryutil.NativeEndian.PutUint32(mark)))
}

// MarkAbove is for packets whose mark is above this number; mask is one byte at most, the lowest.
func MarkAbove(mask, number uint32) []expr.Any {
	return append(markIn(mask&0xff), &expr.Cmp{Op: expr.CmpOpGt, Register: 1, Data: binaryutil.NativeEndian.PutUint32(number)})
}

func markIn(mask uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4)},
	}
}

// OtherUser is for packets of sockets that are not this user's. Packets without a socket, such as forwarded ones, are nobody's and do not match.
func OtherUser(user int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(uint32(user))},
	}
}

// User is for packets of this user's sockets.
func User(user int) []expr.Any {
	return Meta(expr.MetaKeySKUID, binaryutil.NativeEndian.PutUint32(uint32(user)))
}

// UserFrom is for packets of sockets of users with this id or a higher one.
func UserFrom(user int) []expr.Any { return users(expr.CmpOpGte, user) }

// UserBelow is for packets of sockets of users with a lower id than this.
func UserBelow(user int) []expr.Any { return users(expr.CmpOpLt, user) }

func users(op expr.CmpOp, user int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4}, // the kernel compares bytes
		&expr.Cmp{Op: op, Register: 1, Data: binary.BigEndian.AppendUint32(nil, uint32(user))},
	}
}

// Reject ends a rule with word to the sender, who need not wait: an ICMP error, "administratively prohibited".
func Reject() []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

// Equal compares what was loaded.
func Equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

// Verdict ends a rule.
func Verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }
