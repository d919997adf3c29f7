package host

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReadGathers: what the host has sent by then comes with few reads, in its order and whole, runs that the kernel hands over as
// one packet among them.
func TestReadGathers(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	check(t, i.SetAddresses(addrs("198.18.0.2")))
	_, err := i.SetRoutes(prefixes("10.0.0.0/8"), nil)
	check(t, err)
	c, err := net.Dial("udp4", "10.0.0.1:9")
	check(t, err)
	defer c.Close()
	const size, run = 100, 20
	sent := 0
	send := func(n int) {
		var data []byte
		for range n {
			data = append(binary.BigEndian.AppendUint32(data, uint32(sent)), make([]byte, size-4)...)
			sent++
		}
		_, err := c.Write(data)
		check(t, err)
	}
	for range 2 * gatherMost {
		send(1)
	}
	raw, err := c.(*net.UDPConn).SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) }))
	check(t, err)
	send(1)
	send(run)
	send(run)
	send(1)

	bufs, sizes := make([][]byte, 128), make([]int, 128)
	for k := range bufs {
		bufs[k] = make([]byte, 1<<16)
	}
	reads := 0
	for got := 0; got < sent; reads++ {
		n, err := i.Device().Read(bufs, sizes, 16)
		check(t, err)
		if n > gatherMost+run {
			t.Fatalf("%d packets with one read", n)
		}
		for k := range n {
			p := bufs[k][16:][:sizes[k]]
			if to, ok := netip.AddrFromSlice(p[16:20]); p[0]>>4 != 4 || !ok || to != netip.MustParseAddr("10.0.0.1") {
				continue // what the kernel says by itself
			}
			if len(p) != 28+size || binary.BigEndian.Uint32(p[28:]) != uint32(got) {
				t.Fatalf("packet %d has %d bytes and the number %d", got, len(p), binary.BigEndian.Uint32(p[28:]))
			}
			got++
		}
	}
	if reads > 12 {
		t.Errorf("%d packets took %d reads", sent, reads)
	}
}
