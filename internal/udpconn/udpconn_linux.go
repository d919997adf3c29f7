package udpconn

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// platform is what a socket has on Linux.
type platform struct {
	is6     bool        // the socket's family; IPv4 addresses are mapped into it
	several bool        // bound to more than one local address: who answers has to name the right one
	gso     atomic.Bool // the kernel and the device segment
}

// prepare runs before the socket is bound.
func prepare(raw syscall.RawConn, opts *Options) (err error) {
	if !opts.ReusePort {
		return nil
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); cerr != nil {
		return cerr
	}
	return err
}

func (c *Conn) setUp(opts *Options) (err error) {
	c.several = c.local.Addr().IsUnspecified()
	if cerr := c.raw.Control(func(fd uintptr) { err = c.setOptions(int(fd), opts) }); cerr != nil {
		return cerr
	}
	return err
}

func (c *Conn) setOptions(fd int, opts *Options) error {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	_, c.is6 = name.(*unix.SockaddrInet6)
	set := func(level, option, value int) error { return unix.SetsockoptInt(fd, level, option, value) }
	for _, o := range [][2]int{{unix.SO_RCVBUF, unix.SO_RCVBUFFORCE}, {unix.SO_SNDBUF, unix.SO_SNDBUFFORCE}} {
		_ = set(unix.SOL_SOCKET, o[0], opts.Buffer) // as far as net.core.rmem_max and wmem_max go
		_ = set(unix.SOL_SOCKET, o[1], opts.Buffer) // beyond them, which takes CAP_NET_ADMIN
	}
	// Packets are never fragmented, and a forged "fragmentation needed" shrinks nothing: what fits is found by padded
	// checks from end to end.
	_ = set(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	if c.is6 {
		_ = set(unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	}
	_ = set(unix.SOL_SOCKET, unix.SO_BROADCAST, 0) // package net allows it: nobody who names an address has a whole network asked
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	c.gso.Store(err == nil)
	_ = set(unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	if !c.several {
		return nil
	}
	if c.is6 {
		return set(unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	}
	return set(unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
}

// Stats asks the kernel.
func (c *Conn) Stats() (s Stats) {
	_ = c.raw.Control(func(fd uintptr) {
		s.ReceiveBuffer, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
		s.SendBuffer, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
		s.Overflow = overflow(int(fd))
	})
	s.ReceiveBuffer, s.SendBuffer = s.ReceiveBuffer/2, s.SendBuffer/2 // the kernel doubles what it is asked for, see socket(7)
	return s
}

// overflow reads sk_drops (SO_MEMINFO, index SK_MEMINFO_DROPS).
func overflow(fd int) uint32 {
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0
	}
	return info[8]
}

// controlSize holds UDP_GRO or UDP_SEGMENT, and IP_PKTINFO or IPV6_PKTINFO.
const controlSize = 96

// slot is the memory that one message points into.
type slot struct {
	iov     unix.Iovec
	name    unix.RawSockaddrInet6 // large enough for both families
	control [controlSize]byte
}

// Batch is room for the datagrams of one read, 64 KiB each. One goroutine uses it at a time.
type Batch struct {
	conn     *Conn
	messages []unix.Mmsghdr
	slots    []slot
	bufs     [][]byte
	n        int
	err      error
	read     func(fd uintptr) bool // made once, so that reading allocates nothing
	poll     func(fd uintptr) bool
}

// NewBatch makes room for size datagrams or runs.
func (c *Conn) NewBatch(size int) *Batch {
	b := &Batch{conn: c, messages: make([]unix.Mmsghdr, size), slots: make([]slot, size), bufs: make([][]byte, size)}
	memory := make([]byte, size*maxDatagram)
	for i := range size {
		b.bufs[i] = memory[i*maxDatagram : (i+1)*maxDatagram]
		m, s := &b.messages[i], &b.slots[i]
		s.iov.Base = &b.bufs[i][0]
		s.iov.SetLen(maxDatagram)
		m.Hdr.Iov, m.Hdr.Control, m.Hdr.Name = &s.iov, &s.control[0], (*byte)(unsafe.Pointer(&s.name))
		m.Hdr.SetIovlen(1)
	}
	b.read = b.receive
	b.poll = func(fd uintptr) bool {
		b.receive(fd)
		return true
	}
	return b
}

// Read waits for datagrams and takes as many as there are. Its error is [net.ErrClosed] once the socket is closed; after
// any other a later read may succeed.
func (b *Batch) Read() error {
	b.n, b.err = 0, nil
	if err := b.conn.raw.Read(b.read); err != nil {
		return err
	}
	return b.err
}

// Poll is Read that does not wait: without an error there may be nothing.
func (b *Batch) Poll() error {
	b.n, b.err = 0, nil
	if err := b.conn.raw.Read(b.poll); err != nil {
		return err
	}
	return b.err
}

func (b *Batch) receive(fd uintptr) bool {
	for i := range b.messages {
		h := &b.messages[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSize)
	}
	for {
		// A raw call, because it does not wait: the scheduler would hand this thread's share of the processors to another, which the
		// kernel then runs beside it.
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.messages[0])), uintptr(len(b.messages)),
			unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.n = int(n)
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		b.err = fmt.Errorf("receive: %w", errno)
		return true
	}
}

// Len is how many datagrams the last read gave.
func (b *Batch) Len() int { return b.n }

// Datagram gives the i-th. Its data is empty where it did not fit.
func (b *Batch) Datagram(i int) (d Datagram) {
	m := &b.messages[i]
	d.Data = b.bufs[i][:m.Len:m.Len]
	if m.Hdr.Flags&unix.MSG_TRUNC != 0 {
		d.Data = nil
	}
	d.Segment = len(d.Data)
	d.From = readName(&b.slots[i].name)
	b.slots[i].readControl(int(m.Hdr.Controllen), &d)
	return d
}

// readControl reads what the kernel says about a datagram.
func (s *slot) readControl(size int, d *Datagram) {
	for rest := s.control[:size]; len(rest) >= unix.SizeofCmsghdr; {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&rest[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(rest) {
			return
		}
		data := rest[unix.CmsgLen(0):n]
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 2:
			if size := int(binary.NativeEndian.Uint16(data)); size > 0 {
				d.Segment = size
			}
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			d.Local = netip.AddrFrom4([4]byte(data[4:])) // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			d.Local = netip.AddrFrom16([16]byte(data)).Unmap()
		}
		rest = rest[min(unix.CmsgSpace(n-unix.CmsgLen(0)), len(rest)):]
	}
}

func readName(name *unix.RawSockaddrInet6) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&name.Port))[:])
	if name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(name)).Addr), port)
	}
	addr := netip.AddrFrom16(name.Addr).Unmap()
	if name.Scope_id != 0 && addr.IsLinkLocalUnicast() {
		addr = addr.WithZone(strconv.FormatUint(uint64(name.Scope_id), 10))
	}
	return netip.AddrPortFrom(addr, port)
}

// writeName writes an address for a socket of the given family and gives its size, 0 where the socket cannot reach it.
func writeName(name *unix.RawSockaddrInet6, to netip.AddrPort, is6 bool) uint32 {
	addr := to.Addr()
	if !is6 {
		if !addr.Is4() && !addr.Is4In6() {
			return 0
		}
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		*v4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: addr.As4()}
		binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&v4.Port))[:], to.Port())
		return unix.SizeofSockaddrInet4
	}
	*name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: addr.As16()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&name.Port))[:], to.Port())
	if zone := addr.Zone(); zone != "" {
		id, _ := strconv.ParseUint(zone, 10, 32)
		name.Scope_id = uint32(id)
	}
	return unix.SizeofSockaddrInet6
}

// Queue gathers datagrams to send them with one system call. One goroutine uses it at a time.
type Queue struct {
	conn     *Conn
	messages []unix.Mmsghdr
	slots    []slot
	n        int
	at       int   // the first message that has not been sent
	segments []int // of each message
	send     func(fd uintptr)
	write    func(fd uintptr) bool

	Sent    uint64 // datagrams that the kernel took
	Dropped uint64 // datagrams that it did not take at once, or could not send
}

// NewQueue makes room for size datagrams or runs.
func (c *Conn) NewQueue(size int) *Queue {
	q := &Queue{conn: c, messages: make([]unix.Mmsghdr, size), slots: make([]slot, size), segments: make([]int, size)}
	for i := range size {
		m, s := &q.messages[i], &q.slots[i]
		m.Hdr.Iov, m.Hdr.Name = &s.iov, (*byte)(unsafe.Pointer(&s.name))
		m.Hdr.SetIovlen(1)
	}
	q.send = func(fd uintptr) { q.transmit(fd) }
	q.write = q.transmit
	return q
}

// Add queues data for an address: one datagram, or a run of datagrams of size segment, of which the last may be shorter.
// from is the local address to send from, where it matters. The data must stay as it is until [Queue.Flush], which Add
// calls when the queue is full.
func (q *Queue) Add(data []byte, segment int, to netip.AddrPort, from netip.Addr) {
	if segment <= 0 || segment > len(data) {
		segment = len(data)
	}
	limit := max(1, min(MaxSegments, MaxRun/max(segment, 1))) * segment
	for len(data) > 0 {
		n := min(limit, len(data))
		q.add(data[:n], segment, to, from)
		data = data[n:]
	}
}

func (q *Queue) add(data []byte, segment int, to netip.AddrPort, from netip.Addr) {
	if q.n == len(q.messages) {
		q.Flush()
	}
	m, s := &q.messages[q.n], &q.slots[q.n]
	size := writeName(&s.name, to, q.conn.is6)
	if size == 0 {
		q.Dropped += uint64((len(data) + segment - 1) / segment)
		return
	}
	m.Hdr.Namelen = size
	s.iov.Base = &data[0]
	s.iov.SetLen(len(data))
	used := 0
	if len(data) > segment {
		used = s.putSegment(used, segment)
	}
	if q.conn.several && from.IsValid() {
		used = s.putSource(used, from, q.conn.is6)
	}
	m.Hdr.Control = nil
	if used > 0 {
		m.Hdr.Control = &s.control[0]
	}
	m.Hdr.SetControllen(used)
	q.segments[q.n] = segment
	q.n++
}

// putControl starts a control message at a place in s.control and gives where its data goes and where the next one may
// stand.
func (s *slot) putControl(at int, level, typ int32, size int) (data []byte, next int) {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&s.control[at]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	next = at + unix.CmsgSpace(size)
	data = s.control[at+unix.CmsgLen(0) : next]
	clear(data)
	return data, next
}

func (s *slot) putSegment(at, segment int) int {
	data, next := s.putControl(at, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)
	binary.NativeEndian.PutUint16(data, uint16(segment))
	return next
}

func (s *slot) putSource(at int, from netip.Addr, is6 bool) int {
	if is6 {
		data, next := s.putControl(at, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
		a := from.As16()
		copy(data, a[:])
		return next
	}
	if !from.Unmap().Is4() {
		return at
	}
	data, next := s.putControl(at, unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	a := from.As4()
	copy(data[4:], a[:])
	return next
}

// Flush sends what is queued. What the kernel does not take at once is dropped and counted.
func (q *Queue) Flush() {
	if q.n > 0 {
		_ = q.conn.raw.Control(q.send) // what a closed socket does not take is dropped as well
		q.drop()
	}
}

// FlushWait sends what is queued, and waits until the kernel takes it, though no longer than limit: for who sends what it is given no
// faster than it goes out. The rest is dropped and counted.
func (q *Queue) FlushWait(limit time.Duration) {
	if q.n == 0 {
		return
	}
	_ = q.conn.raw.Control(q.send)
	if q.at < q.n && q.conn.udp.SetWriteDeadline(time.Now().Add(limit)) == nil {
		_ = q.conn.raw.Write(q.write)
	}
	q.drop()
}

// drop forgets what has not been sent.
func (q *Queue) drop() {
	for ; q.at < q.n; q.at++ {
		q.Dropped += q.datagrams(q.at)
	}
	q.n, q.at = 0, 0
}

// datagrams is how many datagrams the i-th message holds.
func (q *Queue) datagrams(i int) uint64 {
	return (uint64(q.slots[i].iov.Len) + uint64(q.segments[i]) - 1) / uint64(q.segments[i])
}

// transmit sends messages and reports whether it is done with all of them: false says that the kernel takes no more at the moment.
func (q *Queue) transmit(fd uintptr) bool {
	for q.at < q.n {
		i := q.at
		if !q.conn.gso.Load() && q.datagrams(i) > 1 {
			q.split(fd, i)
			q.at++
			continue
		}
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&q.messages[i])), uintptr(q.ready(i)), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			for end := i + int(n); q.at < end; q.at++ {
				q.Sent += q.datagrams(q.at)
			}
		case errno == unix.EINTR:
		case errno == unix.EIO && q.datagrams(i) > 1:
			q.conn.gso.Store(false) // the device cannot compute checksums, which segmentation needs
		case errno == unix.EAGAIN:
			return false
		case errno == unix.ENOBUFS:
			q.drop()
		default: // too large for the path, no route, refused by a firewall: the next one may go elsewhere
			q.Dropped += q.datagrams(i)
			q.at++
		}
	}
	return true
}

// ready is how many messages from the i-th on can be sent with one call: all, unless some have to be split.
func (q *Queue) ready(i int) int {
	if q.conn.gso.Load() {
		return q.n - i
	}
	end := i
	for end < q.n && q.datagrams(end) == 1 {
		end++
	}
	return end - i
}

// split sends the i-th message's datagrams one by one, where nothing segments them.
func (q *Queue) split(fd uintptr, i int) {
	m, s := q.messages[i], &q.slots[i]
	data := unsafe.Slice(s.iov.Base, int(s.iov.Len))
	at := unix.CmsgSpace(2) // UDP_SEGMENT is the first control message
	size := int(m.Hdr.Controllen) - at
	m.Hdr.Control = nil
	if size > 0 {
		m.Hdr.Control = &s.control[at]
	}
	m.Hdr.SetControllen(size)
	for len(data) > 0 {
		n := min(q.segments[i], len(data))
		s.iov.Base = &data[0]
		s.iov.SetLen(n)
		data = data[n:]
		if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m.Hdr)), unix.MSG_DONTWAIT); errno != 0 {
			q.Dropped++
			continue
		}
		q.Sent++
	}
}
