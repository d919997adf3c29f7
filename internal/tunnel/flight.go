package tunnel

import (
	"encoding/binary"
	"math/bits"
	"sync"

	"golang.zx2c4.com/wireguard/device"
)

// flight is what is inside the device on its way to the TUN, in the order in which the device got it. The device drops without a word what
// it cannot decrypt, or has had already: a path may bring every packet twice. But what it does not drop it brings out in order. So
// when a packet comes out, all before it are done with as well, whatever has become of them.
//
// Several goroutines give the device packets, and two that do so at the same moment may be taken for the other way round; then a packet
// counts as done with a moment too early.
type flight struct {
	keys    [flightMost]uint64
	head, n int
}

// flightMost is more than whoever keeps account lets into the device; beyond that the oldest are forgotten.
const flightMost = 1024

// flights are there only for peers with packets inside.
var flights = sync.Pool{New: func() any { return new(flight) }}

// flightKey tells transport messages apart, by the keys that they are under and their counters. wireguard-go decrypts in place and leaves
// the header before what comes out.
func flightKey(header []byte) uint64 {
	return binary.LittleEndian.Uint64(header[8:]) ^ bits.RotateLeft64(uint64(binary.LittleEndian.Uint32(header[4:])), 32)
}

// lastOut is the key of the last of the packets that have come out of the device, each behind its header.
func lastOut(bufs [][]byte, offset int) uint64 {
	return flightKey(bufs[len(bufs)-1][offset-device.MessageTransportHeaderSize:])
}

// push adds a packet. It gives how many more there are now: none where the oldest had to go.
func (f *flight) push(key uint64) int {
	if f.n == flightMost {
		f.head = (f.head + 1) % flightMost
		f.n--
	}
	f.keys[(f.head+f.n)%flightMost] = key
	f.n++
	return f.n
}

// pop takes out a packet and all before it, and says how many there are still. A packet that is not there changes nothing.
func (f *flight) pop(key uint64) int {
	for i := range f.n {
		if f.keys[(f.head+i)%flightMost] == key {
			f.head = (f.head + i + 1) % flightMost
			f.n -= i + 1
			break
		}
	}
	return f.n
}

// clear takes out all.
func (f *flight) clear() { f.head, f.n = 0, 0 }
