package host

import (
	"encoding/binary"
	"os"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

const (
	ipv4Len, ipv6Len, tcpLen = 20, 40, 20
	// packetMost is the longest packet that an IPv4 header can tell of.
	packetMost = 65535
	// runMost is how many packets go into one: more than that never come at a time.
	runMost = 128

	flagFIN, flagPSH, flagACK = 0x01, 0x08, 0x10
)

// segment is what is read of a TCP segment.
type segment struct {
	ip, head int // lengths of the IP header, and of both headers
	data     int
	seq      uint32
	flags    byte
}

// readSegment reads a TCP segment that can be joined to others. It has no IP options or extension headers, is no fragment, and as long as
// its header says.
func readSegment(p []byte) (s segment, ok bool) {
	switch {
	case len(p) >= ipv4Len+tcpLen && p[0] == 4<<4|ipv4Len/4 && p[9] == unix.IPPROTO_TCP:
		s.ip = ipv4Len
		ok = int(binary.BigEndian.Uint16(p[2:])) == len(p) && binary.BigEndian.Uint16(p[6:])&0x3fff == 0
	case len(p) >= ipv6Len+tcpLen && p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
		s.ip = ipv6Len
		ok = int(binary.BigEndian.Uint16(p[4:])) == len(p)-ipv6Len
	}
	if !ok {
		return s, false
	}
	tcp := p[s.ip:]
	s.head = s.ip + int(tcp[12]>>4)*4
	s.data = len(p) - s.head
	s.seq, s.flags = binary.BigEndian.Uint32(tcp[4:]), tcp[13]
	return s, s.head >= s.ip+tcpLen && s.data >= 0
}

// alike reports that the headers of two segments differ only in what joining them says anew: lengths, checksums, the number in sequence,
// PSH, and IPv4's identification, which means nothing in a packet that is not to be fragmented and counts up in any other (RFC 6864).
func alike(p, q []byte, s segment) bool {
	if p[1] != q[1] {
		return false
	}
	if s.ip == ipv4Len {
		if [4]byte(p[6:10]) != [4]byte(q[6:10]) || [8]byte(p[12:20]) != [8]byte(q[12:20]) {
			return false
		}
	} else if [4]byte(p[:4]) != [4]byte(q[:4]) || p[7] != q[7] || [32]byte(p[8:40]) != [32]byte(q[8:40]) {
		return false
	}
	a, b := p[s.ip:s.head], q[s.ip:s.head]
	return [4]byte(a) == [4]byte(b) && [4]byte(a[8:12]) == [4]byte(b[8:12]) && // ports and acknowledgement
		a[12] == b[12] && [2]byte(a[14:16]) == [2]byte(b[14:16]) && string(a[tcpLen:]) == string(b[tcpLen:]) // window and options
}

// run tells how many of the first packets make one: segments of one connection, each following on the one before, of one length but for
// the last, and with right checksums. The kernel does not look at these again, so a damaged one goes to it by itself.
func run(bufs [][]byte, offset int) (n int, first segment) {
	p := bufs[0][offset:]
	first, ok := readSegment(p)
	if !ok || first.data == 0 || first.flags != flagACK {
		return 1, first
	}
	size := len(p)
	for n = 1; n < min(len(bufs), runMost); n++ {
		q := bufs[n][offset:]
		s, ok := readSegment(q)
		if !ok || s.ip != first.ip || s.head != first.head || s.seq != first.seq+uint32(size-first.head) || s.flags&^flagPSH != flagACK ||
			s.data == 0 || s.data > first.data || size+s.data > packetMost || !alike(p, q, first) || n == 1 && !intact(p, first.ip) || !intact(q, s.ip) {
			break
		}
		if size += s.data; s.flags != flagACK || s.data < first.data {
			return n + 1, first
		}
	}
	return n, first
}

// addresses are the two of a packet, as a checksum sees them.
func addresses(p []byte, ip int) []byte {
	if ip == ipv4Len {
		return p[12:20]
	}
	return p[8:40]
}

// pseudo is the sum of a TCP segment's pseudo-header (RFC 9293, section 3.1).
func pseudo(p []byte, ip, length int) uint16 {
	sum := checksum.Checksum(addresses(p, ip), unix.IPPROTO_TCP)
	return checksum.Combine(sum, uint16(length))
}

// intact verifies the checksums of a TCP segment and of its IPv4 header.
func intact(p []byte, ip int) bool {
	if ip == ipv4Len && checksum.Checksum(p[:ip], 0) != 0xffff {
		return false
	}
	return checksum.Checksum(p[ip:], pseudo(p, ip, len(p)-ip)) == 0xffff
}

// joint writes several packets as one, from where they lie.
type joint struct {
	mu    sync.Mutex
	iov   [runMost]unix.Iovec
	n     int
	size  int
	write func(fd uintptr) bool // j.try, made once
	err   error
}

func newJoint() *joint {
	j := new(joint)
	j.write = j.try
	return j
}

// send writes a run of which first is the first segment. It writes over the headers of the first packet and what is before them.
func (j *joint) send(raw syscall.RawConn, bufs [][]byte, offset int, first segment) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.n, j.size = 0, 0
	j.add(bufs[0][offset-vnetLen:])
	for _, buf := range bufs[1:] {
		j.add(buf[offset+first.head:])
	}
	last := bufs[len(bufs)-1][offset:]
	finish(bufs[0][offset-vnetLen:], j.size-vnetLen, last[first.ip+13], first)
	j.err = nil
	if raw.Write(j.write) != nil {
		j.err = os.ErrClosed
	}
	clear(j.iov[:j.n]) // the buffers are the caller's again
	runtime.KeepAlive(bufs)
	return j.err
}

func (j *joint) add(b []byte) {
	j.iov[j.n].Base = &b[0]
	j.iov[j.n].SetLen(len(b))
	j.n++
	j.size += len(b)
}

// try runs under the poller; false says that the device takes nothing and it is to wait. A raw call, because it does not wait itself: the
// scheduler would hand this thread's share of the processors to another.
func (j *joint) try(fd uintptr) bool {
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&j.iov[0])), uintptr(j.n))
		switch errno {
		case 0:
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		case unix.EBADFD:
			j.err = os.ErrClosed
			return true
		}
		j.err = os.NewSyscallError("writev", errno)
		return true
	}
}

// finish makes the first packet's headers, behind the room for what the kernel is told of a packet, those of all: size bytes long, and
// the last one's flags. The TCP checksum is left to be completed by who needs it, as the kernel leaves its own.
func finish(b []byte, size int, flags byte, first segment) {
	v := vnet{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, kind: unix.VIRTIO_NET_HDR_GSO_TCPV4, head: first.head, size: first.data, start: first.ip, at: 16}
	p := b[vnetLen:]
	if first.ip == ipv4Len {
		binary.BigEndian.PutUint16(p[2:], uint16(size))
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ipv4Len], 0))
	} else {
		v.kind = unix.VIRTIO_NET_HDR_GSO_TCPV6
		binary.BigEndian.PutUint16(p[4:], uint16(size-ipv6Len))
	}
	v.put(b)
	tcp := p[first.ip:]
	tcp[13] |= flags
	binary.BigEndian.PutUint16(tcp[16:], pseudo(p, first.ip, size-first.ip))
}

// vnetLen is the length of a virtio_net_hdr of linux/virtio_net.h, which stands before each packet from and to the kernel.
const vnetLen = 10

// vnet is a virtio_net_hdr: what is left to do about a packet. Its numbers are in the host's byte order.
type vnet struct {
	flags, kind byte
	head        int // bytes of headers
	size        int // bytes of data in each packet that is to be cut off
	start, at   int // where the checksummed part begins, and where in it the checksum stands
}

func (v *vnet) put(b []byte) {
	b[0], b[1] = v.flags, v.kind
	for i, n := range [4]int{v.head, v.size, v.start, v.at} {
		binary.NativeEndian.PutUint16(b[2+2*i:], uint16(n))
	}
}

func (v *vnet) read(b []byte) {
	v.flags, v.kind = b[0], b[1]
	for i, n := range [4]*int{&v.head, &v.size, &v.start, &v.at} {
		*n = int(binary.NativeEndian.Uint16(b[2+2*i:]))
	}
}
