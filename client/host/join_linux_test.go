package host

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"pgregory.net/rapid"
)

const testOffset = 16

// seqTUN is a device at the other end of a socket that keeps messages apart, as the kernel keeps packets.
type seqTUN struct {
	tun.Device
	file *os.File
	side []int // the sizes of what Write got
}

func (s *seqTUN) File() *os.File           { return s.file }
func (*seqTUN) BatchSize() int             { return 128 }
func (s *seqTUN) Close() error             { return s.file.Close() }
func (s *seqTUN) Events() <-chan tun.Event { c := make(chan tun.Event); close(c); return c }

// Write sends each packet by itself.
func (s *seqTUN) Write(bufs [][]byte, offset int) (int, error) {
	for _, buf := range bufs {
		clear(buf[offset-vnetLen : offset])
		if _, err := s.file.Write(buf[offset-vnetLen:]); err != nil {
			return 0, err
		}
		s.side = append(s.side, len(buf)-offset)
	}
	return len(bufs), nil
}

// pair gives a device and the kernel's end of it.
func pair(t testing.TB) (d *device, native *seqTUN, kernel *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	native = &seqTUN{file: os.NewFile(uintptr(fds[0]), "tun")}
	kernel = os.NewFile(uintptr(fds[1]), "kernel")
	d = newDevice(native, func() {})
	return d, native, kernel
}

// flow makes a connection's packets.
type flow struct {
	v6   bool
	port uint16
	seq  uint32
	id   uint16
}

func (f *flow) packet(data int, flags byte, options int) []byte {
	ip := ipv4Len
	if f.v6 {
		ip = ipv6Len
	}
	head := ip + tcpLen + options
	p := make([]byte, head+data)
	if f.v6 {
		p[0], p[6], p[7], p[23], p[39] = 6<<4, unix.IPPROTO_TCP, 64, 1, 2
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ipv6Len))
	} else {
		copy(p, []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, unix.IPPROTO_TCP, 0, 0, 10, 0, 0, 1, 198, 18, 0, 2})
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		binary.BigEndian.PutUint16(p[4:], f.id)
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ipv4Len], 0))
		f.id++
	}
	tcp := p[ip:]
	binary.BigEndian.PutUint16(tcp, f.port)
	binary.BigEndian.PutUint16(tcp[2:], 40000)
	binary.BigEndian.PutUint32(tcp[4:], f.seq)
	tcp[12], tcp[13], tcp[14] = byte((tcpLen+options)/4<<4), flags, 8
	for i := range tcp[tcpLen:] {
		tcp[tcpLen+i] = byte(f.seq>>8) + byte(i*7)
		if i < options {
			tcp[tcpLen+i] = 1 // no operation
		}
	}
	binary.BigEndian.PutUint16(tcp[16:], complete(tcp, pseudo(p, ip, len(tcp))))
	f.seq += uint32(data)
	return p
}

// asBufs puts packets where wireguard-go has them.
func asBufs(packets [][]byte) [][]byte {
	var bufs [][]byte
	for _, p := range packets {
		bufs = append(bufs, append(bytes.Repeat([]byte{0xee}, testOffset), p...))
	}
	return bufs
}

// expand gives the packets that a message to the kernel stands for.
func expand(t rapid.TB, message []byte) [][]byte {
	bufs, sizes := make([][]byte, 128), make([]int, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 2000)
	}
	n, err := cut(message, bufs, sizes, 0)
	if err != nil || n == 0 {
		t.Fatalf("cut gives %d packets and %v", n, err)
	}
	for i := range n {
		bufs[i] = bufs[i][:sizes[i]]
	}
	return bufs[:n]
}

// plain is a packet without what joining and cutting need not keep: IPv4's identification, and with it the header's checksum.
func plain(p []byte) []byte {
	p = bytes.Clone(p)
	if p[0]>>4 == 4 {
		p[4], p[5], p[10], p[11] = 0, 0, 0, 0
	}
	return p
}

// TestWriteKeepsPackets: whatever is joined, the kernel gets the same packets in the same order, the damaged ones still damaged.
func TestWriteKeepsPackets(t *testing.T) {
	d, _, kernel := pair(t)
	defer d.Close()
	defer kernel.Close()
	buf := make([]byte, vnetLen+packetMost)
	rapid.Check(t, func(t *rapid.T) {
		flows := []*flow{{port: 80}, {port: 81}, {v6: true, port: 80}}
		var packets [][]byte
		for len(packets) < rapid.IntRange(1, 100).Draw(t, "packets") {
			f := rapid.SampledFrom(flows).Draw(t, "flow")
			size := rapid.SampledFrom([]int{1, 500, 1348}).Draw(t, "size")
			options := rapid.SampledFrom([]int{0, 12}).Draw(t, "options")
			for range rapid.IntRange(1, 60).Draw(t, "run") {
				packets = append(packets, f.packet(size, flagACK, options))
			}
			p := packets[len(packets)-1]
			switch rapid.SampledFrom([]string{"", "push", "fin", "empty", "damaged", "header", "lost", "fragment", "datagram", "long", "ecn", "window"}).Draw(t, "last") {
			case "push":
				packets = append(packets, f.packet(size, flagACK|flagPSH, options))
			case "fin":
				packets = append(packets, f.packet(size, flagACK|flagFIN, options))
			case "empty":
				packets = append(packets, f.packet(0, flagACK, options))
			case "damaged":
				p[len(p)-1] ^= 0x40
			case "header":
				p[1] ^= 3 // and a header's checksum that does not say so
			case "lost":
				f.seq++
			case "fragment":
				if p[0]>>4 == 4 {
					p[6] |= 0x20
				}
			case "datagram":
				p[6+3*(1-int(p[0]>>6))] = unix.IPPROTO_UDP
			case "long":
				packets[len(packets)-1] = append(p, 0)
			case "ecn":
				p[len(p)-size-options-tcpLen+13] |= 0x80
			case "window":
				p[len(p)-size-options-tcpLen+14]++
			}
		}
		var want [][]byte
		for _, p := range packets {
			want = append(want, plain(p))
		}
		for rest := packets; len(rest) > 0; {
			n := min(44, len(rest))
			written := asBufs(rest[:n])
			rest = rest[n:]
			if got, err := d.Write(written, testOffset); got != n || err != nil {
				t.Fatalf("wrote %d of %d packets: %v", got, n, err)
			}
			for n > 0 {
				m, err := kernel.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range expand(t, buf[:m]) {
					if len(want) == 0 || !bytes.Equal(plain(p), want[0]) {
						t.Fatalf("a packet came that was not sent, or not then:\n%x", p)
					}
					want, n = want[1:], n-1
				}
			}
		}
	})
}

// TestWriteJoins: a run is one message, and what is damaged in it goes by itself.
func TestWriteJoins(t *testing.T) {
	for name, c := range map[string]struct {
		change func(packets [][]byte)
		joined []int // packets in each message
	}{
		"all":           {func([][]byte) {}, []int{20}},
		"damaged":       {func(p [][]byte) { p[7][60]++ }, []int{7, 1, 12}},
		"first damaged": {func(p [][]byte) { p[0][60]++ }, []int{1, 19}},
		"two damaged":   {func(p [][]byte) { p[7][60]++; p[8][60]++ }, []int{7, 1, 1, 11}},
		"last damaged":  {func(p [][]byte) { p[19][60]++ }, []int{19, 1}},
		"out of order":  {func(p [][]byte) { p[5], p[6] = p[6], p[5] }, []int{5, 1, 1, 13}},
		"twice":         {func(p [][]byte) { p[6] = p[5] }, []int{6, 1, 13}},
	} {
		t.Run(name, func(t *testing.T) {
			d, _, kernel := pair(t)
			defer d.Close()
			defer kernel.Close()
			var packets [][]byte
			for f := (&flow{port: 80}); len(packets) < 20; {
				packets = append(packets, f.packet(1348, flagACK, 12))
			}
			c.change(packets)
			_, err := d.Write(asBufs(packets), testOffset)
			check(t, err)
			buf := make([]byte, vnetLen+packetMost)
			for _, want := range c.joined {
				n, err := kernel.Read(buf)
				check(t, err)
				if got := len(expand(t, buf[:n])); got != want {
					t.Errorf("%d packets as one, want %d", got, want)
				}
			}
		})
	}
}

// TestWriteWaits: a device that takes nothing for now loses nothing.
func TestWriteWaits(t *testing.T) {
	d, _, kernel := pair(t)
	defer kernel.Close()
	defer d.Close()
	const rounds = 50 // more than the socket holds
	wrote := make(chan error, 1)
	go func() {
		f := &flow{port: 80}
		for range rounds {
			var packets [][]byte
			for range 40 {
				packets = append(packets, f.packet(1348, flagACK, 12))
			}
			if _, err := d.Write(asBufs(packets), testOffset); err != nil {
				wrote <- err
				return
			}
		}
		wrote <- nil
	}()
	buf := make([]byte, vnetLen+packetMost)
	seq := uint32(0)
	for range rounds {
		n, err := kernel.Read(buf)
		check(t, err)
		for _, p := range expand(t, buf[:n]) {
			if got := binary.BigEndian.Uint32(p[ipv4Len+4:]); got != seq {
				t.Fatalf("segment %d came in place of %d", got, seq)
			}
			seq += 1348
		}
	}
	check(t, <-wrote)
}

// TestDeviceCloses: whoever waits for a packet learns that there will be none, and nothing is written any more.
func TestDeviceCloses(t *testing.T) {
	d, _, kernel := pair(t)
	defer kernel.Close()
	read := make(chan error, 1)
	go func() {
		_, err := d.Read([][]byte{make([]byte, 1<<16)}, make([]int, 1), 0)
		read <- err
	}()
	check(t, d.Close())
	if err := <-read; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read gives %v", err)
	}
	f := &flow{port: 80}
	if _, err := d.Write(asBufs([][]byte{f.packet(100, flagACK, 0), f.packet(100, flagACK, 0)}), testOffset); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write gives %v", err)
	}
}

// TestReadStops: a Read ends where there is nothing, where there is no room, and after a large packet.
func TestReadStops(t *testing.T) {
	d, _, kernel := pair(t)
	defer d.Close()
	defer kernel.Close()
	bufs, sizes := make([][]byte, 30), make([]int, 30)
	for i := range bufs {
		bufs[i] = make([]byte, 2000)
	}
	f := &flow{port: 80}
	send := func(packets int) {
		t.Helper()
		for range packets {
			_, err := kernel.Write(append(make([]byte, vnetLen), f.packet(100, flagACK, 0)...))
			check(t, err)
		}
	}
	read := func(want int) {
		t.Helper()
		if n, err := d.Read(bufs, sizes, testOffset); n != want || err != nil {
			t.Errorf("%d packets and %v, want %d", n, err, want)
		}
		for i := range want {
			if _, ok := readSegment(bufs[i][testOffset:][:sizes[i]]); !ok {
				t.Errorf("packet %d is none: %x", i, bufs[i][testOffset:][:sizes[i]])
			}
		}
	}
	send(1)
	read(1)
	send(3)
	read(3)
	send(32)
	read(30)
	read(2)
	_, err := kernel.Write([]byte{1, 2, 3}) // no packet
	check(t, err)
	send(2)
	read(2)
	var packets [][]byte
	for range 20 {
		packets = append(packets, f.packet(100, flagACK, 0))
	}
	large, sizeOf := asBufs(packets), 0
	d.Write(large, testOffset)
	message := make([]byte, vnetLen+packetMost)
	sizeOf, err = kernel.Read(message)
	check(t, err)
	send(1)
	_, err = kernel.Write(message[:sizeOf])
	check(t, err)
	send(1)
	read(21)
	read(1)
	_, err = kernel.Write(message[:sizeOf])
	check(t, err)
	if n, err := d.Read(bufs[:10], sizes, testOffset); n != 10 || !errors.Is(err, tun.ErrTooManySegments) {
		t.Errorf("%d packets and %v where there is room for ten", n, err)
	}
}

// TestKernelTakesRuns: the real device takes a run for one packet.
func TestKernelTakesRuns(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	check(t, i.SetAddresses(addrs("198.18.0.2")))
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
	check(t, err)
	defer unix.Close(fd)
	check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}))
	f, buf := &flow{port: 80}, make([]byte, 1<<17)
	for _, v6 := range []bool{false, true} {
		f.v6 = v6
		var packets [][]byte
		for range 40 {
			packets = append(packets, f.packet(1348, flagACK, 12))
		}
		_, err := i.Device().Write(asBufs(packets), testOffset)
		check(t, err)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			check(t, err)
			if s, ok := readSegment(buf[:n]); !ok || s.data == 0 || s.ip == ipv6Len != v6 {
				continue // what the kernel says by itself
			}
			if want := len(packets[0]) + 39*1348; n != want {
				t.Fatalf("the kernel has a packet of %d bytes, want %d", n, want)
			}
			break
		}
	}
}

// FuzzCut: whatever the kernel says of a packet, what comes of it lies within it.
func FuzzCut(f *testing.F) {
	d, _, kernel := pair(f)
	for _, fl := range []*flow{{port: 80}, {port: 80, v6: true}} {
		_, _ = d.Write(asBufs([][]byte{fl.packet(500, flagACK, 12), fl.packet(500, flagACK, 12), fl.packet(7, flagACK|flagPSH, 12)}), testOffset)
		buf := make([]byte, 1<<16)
		n, err := kernel.Read(buf)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(buf[:n])
	}
	d.Close()
	kernel.Close()
	datagrams := vnet{flags: 1, kind: unix.VIRTIO_NET_HDR_GSO_UDP_L4, head: 28, size: 10, start: 20, at: 6}
	for _, data := range []int{35, 11, 1} {
		message := make([]byte, vnetLen+28+data)
		datagrams.put(message)
		message[vnetLen], message[vnetLen+9] = 0x45, unix.IPPROTO_UDP
		f.Add(message)
	}
	short := vnet{flags: 1, kind: unix.VIRTIO_NET_HDR_GSO_TCPV4, size: 500, start: 20, at: 16}
	message := make([]byte, vnetLen+510)
	short.put(message)
	message[vnetLen], message[vnetLen+9], message[vnetLen+32] = 0x45, unix.IPPROTO_TCP, 2<<4 // a header of eight bytes
	f.Add(message)
	bufs, sizes := make([][]byte, 8), make([]int, 8)
	for i := range bufs {
		bufs[i] = make([]byte, 1<<16)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		if len(message) > vnetLen+packetMost {
			return
		}
		n, _ := cut(bytes.Clone(message), bufs, sizes, testOffset)
		total := 0
		for _, size := range sizes[:n] {
			if size < 1 || size > len(message) {
				t.Errorf("a packet of %d bytes out of %d", size, len(message))
			}
			total += size
		}
		if n == 1 && total > len(message)-vnetLen {
			t.Errorf("%d bytes out of %d", total, len(message))
		}
	})
}

// soundSegment makes a TCP segment of what may be anything: lengths and checksums are right, so that it can be joined.
func soundSegment(p []byte) []byte {
	ip := ipv4Len
	if p[0]>>4 == 6 {
		ip = ipv6Len
	}
	if len(p) < ip+tcpLen {
		return p
	}
	if ip == ipv6Len {
		p[6] = unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ip))
	} else {
		p[0], p[6], p[7], p[9], p[10], p[11] = 0x45, 0x40, 0, unix.IPPROTO_TCP, 0, 0
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ip], 0))
	}
	tcp := p[ip:]
	tcp[16], tcp[17] = 0, 0
	binary.BigEndian.PutUint16(tcp[16:], complete(tcp, pseudo(p, ip, len(tcp))))
	return p
}

// FuzzJoin: whatever a gateway sends, the kernel gets the same packets in the same order. Each stands behind its length in two bytes.
func FuzzJoin(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		fl, seed := &flow{port: 80, v6: v6}, []byte(nil)
		for _, size := range []int{500, 500, 500, 7, 500, 500} {
			p := fl.packet(size, flagACK, 12)
			seed = append(binary.BigEndian.AppendUint16(seed, uint16(len(p))), p...)
		}
		f.Add(seed, true)
		f.Add(seed, false)
	}
	d, _, kernel := pair(f)
	f.Cleanup(func() { d.Close(); kernel.Close() })
	buf := make([]byte, vnetLen+packetMost)
	f.Fuzz(func(t *testing.T, stream []byte, sound bool) {
		var packets, want [][]byte
		for len(stream) >= 2 && len(packets) < gatherMost {
			n := min(int(binary.BigEndian.Uint16(stream)), len(stream)-2, 1500)
			p := bytes.Clone(stream[2 : 2+n])
			if stream = stream[2+n:]; n < ipv4Len || p[0]>>4 == 6 && n < ipv6Len {
				continue // WireGuard gives no such packets
			}
			if sound {
				p = soundSegment(p)
			}
			packets, want = append(packets, p), append(want, plain(p))
		}
		if len(packets) == 0 {
			return
		}
		if _, err := d.Write(asBufs(packets), testOffset); err != nil {
			t.Fatal(err)
		}
		for len(want) > 0 {
			n, err := kernel.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range expand(t, buf[:n]) {
				if len(want) == 0 || !bytes.Equal(plain(p), want[0]) {
					t.Fatalf("a packet came that was not sent, or not then:\n%x", p)
				}
				want = want[1:]
			}
		}
	})
}
