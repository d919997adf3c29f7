package host

import (
	"encoding/binary"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// intake reads from the device. One goroutine uses it.
type intake struct {
	raw  syscall.RawConn
	read func(fd uintptr) bool // made once
	more func(fd uintptr) bool
	n    int // bytes of the last read; 0 where there were none
	err  error
	buf  [vnetLen + packetMost]byte
}

func newIntake(raw syscall.RawConn) *intake {
	t := &intake{raw: raw}
	t.read = t.try
	t.more = func(fd uintptr) bool {
		t.try(fd)
		return true
	}
	return t
}

// next reads one packet of the kernel's and cuts it into those that it stands for. It gives none where there is none and it is not to wait,
// and for a packet about which the kernel says what cannot be.
func (t *intake) next(wait bool, bufs [][]byte, sizes []int, offset int) (int, error) {
	read := t.more
	if wait {
		read = t.read
	}
	t.n, t.err = 0, nil
	if t.raw.Read(read) != nil {
		return 0, os.ErrClosed
	}
	if t.err != nil || t.n == 0 {
		return 0, t.err
	}
	return cut(t.buf[:t.n], bufs, sizes, offset)
}

// try runs under the poller; false says that there is nothing. A raw call, because it does not wait itself: the scheduler would wake
// who looks after calls that do.
func (t *intake) try(fd uintptr) bool {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&t.buf)), uintptr(len(t.buf)))
		switch errno {
		case 0:
			t.n = int(n)
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		case unix.EBADFD:
			t.err = os.ErrClosed
			return true
		}
		t.err = os.NewSyscallError("read", errno)
		return true
	}
}

// cut makes packets with complete checksums of one of the kernel's, behind its virtio_net_hdr.
func cut(in []byte, bufs [][]byte, sizes []int, offset int) (int, error) {
	if len(in) <= vnetLen {
		return 0, nil
	}
	var v vnet
	v.read(in)
	p := in[vnetLen:]
	sum := v.start + v.at
	if v.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 && sum+2 > len(p) {
		return 0, nil
	}
	if v.kind == unix.VIRTIO_NET_HDR_GSO_NONE {
		return whole(p, &v, bufs[0][offset:], sizes)
	}
	if !v.valid(p) {
		return 0, nil
	}
	c := cutter{vnet: v, p: p, tcp: v.kind != unix.VIRTIO_NET_HDR_GSO_UDP_L4}
	c.prepare()
	n := 0
	for at := c.head; at < len(p); at += c.size {
		if n == len(bufs) {
			return n, tun.ErrTooManySegments
		}
		sizes[n] = c.piece(bufs[n][offset:], at, n)
		n++
	}
	return n, nil
}

// whole completes the checksum of a packet that is one.
func whole(p []byte, v *vnet, out []byte, sizes []int) (int, error) {
	if v.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
		field := p[v.start+v.at:]
		first := binary.BigEndian.Uint16(field) // the pseudo-header's
		field[0], field[1] = 0, 0
		binary.BigEndian.PutUint16(field, complete(p[v.start:], first))
	}
	if len(p) > len(out) {
		return 0, nil
	}
	sizes[0] = copy(out, p)
	return 1, nil
}

// complete gives a checksum. It is never 0, which says of a datagram that there is none (RFC 768).
func complete(b []byte, pseudo uint16) uint16 {
	if sum := ^checksum.Checksum(b, pseudo); sum != 0 {
		return sum
	}
	return 0xffff
}

// valid reports that a packet is what its virtio_net_hdr says, and sets where its data begins: what the kernel says of that is no more than
// a hint.
func (v *vnet) valid(p []byte) bool {
	proto, least := byte(unix.IPPROTO_TCP), tcpLen
	if v.kind == unix.VIRTIO_NET_HDR_GSO_UDP_L4 {
		proto, least = unix.IPPROTO_UDP, udpLen
	}
	switch {
	case p[0]>>4 == 4 && v.kind != unix.VIRTIO_NET_HDR_GSO_TCPV6 && v.start >= ipv4Len && v.start == int(p[0]&0xf)*4:
	case p[0]>>4 == 6 && v.kind != unix.VIRTIO_NET_HDR_GSO_TCPV4 && v.start >= ipv6Len:
	default:
		return false
	}
	if len(p) < v.start+least || v.size == 0 || p[0]>>4 == 4 && p[9] != proto {
		return false
	}
	transport := least
	switch v.kind {
	case unix.VIRTIO_NET_HDR_GSO_TCPV4, unix.VIRTIO_NET_HDR_GSO_TCPV6:
		transport = int(p[v.start+12]>>4) * 4
		v.at = 16
	case unix.VIRTIO_NET_HDR_GSO_UDP_L4:
		v.at = 6
	default:
		return false
	}
	v.head = v.start + transport
	return transport >= least && v.head < len(p)
}

const udpLen = 8

// cutter cuts a large packet.
type cutter struct {
	vnet
	p      []byte
	tcp    bool
	seq    uint32
	id     uint16
	pseudo uint16 // sum over the addresses and the protocol
}

func (c *cutter) prepare() {
	proto, ip := uint16(unix.IPPROTO_UDP), ipv6Len
	if c.p[0]>>4 == 4 {
		ip = ipv4Len
		c.id = binary.BigEndian.Uint16(c.p[4:])
	}
	if c.tcp {
		proto = unix.IPPROTO_TCP
		c.seq = binary.BigEndian.Uint32(c.p[c.start+4:])
	}
	c.pseudo = checksum.Checksum(addresses(c.p, ip), proto)
	c.p[c.start+c.at], c.p[c.start+c.at+1] = 0, 0
}

// piece writes the i-th packet, whose data begins at a place in the large one, and gives its length.
func (c *cutter) piece(out []byte, at, i int) int {
	end := min(at+c.size, len(c.p))
	total := copy(out, c.p[:c.head])
	total += copy(out[total:], c.p[at:end])
	out = out[:total]
	if out[0]>>4 == 4 {
		binary.BigEndian.PutUint16(out[2:], uint16(total))
		binary.BigEndian.PutUint16(out[4:], c.id+uint16(i))
		out[10], out[11] = 0, 0
		binary.BigEndian.PutUint16(out[10:], ^checksum.Checksum(out[:c.start], 0))
	} else {
		binary.BigEndian.PutUint16(out[4:], uint16(total-ipv6Len))
	}
	transport := out[c.start:]
	if c.tcp {
		binary.BigEndian.PutUint32(transport[4:], c.seq+uint32(at-c.head))
		if end < len(c.p) {
			transport[13] &^= flagFIN | flagPSH // the last one's alone
		}
	} else {
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
	}
	binary.BigEndian.PutUint16(transport[c.at:], complete(transport, checksum.Combine(c.pseudo, uint16(len(transport)))))
	return total
}
