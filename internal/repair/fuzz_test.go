package repair

import (
	"bytes"
	"testing"
)

// FuzzDecoder has a decoder take a stream of packets, each behind a byte of its length; an empty one ends the wait.
func FuzzDecoder(f *testing.F) {
	e := NewEncoder()
	var seed []byte
	for c := range uint64(2 * GroupSize) {
		m := message(1, c, 40)
		for _, pkt := range [][]byte{m, e.Add(nil, m)} {
			if len(pkt) > 0 && c != 7 {
				seed = append(append(seed, byte(len(pkt))), pkt...)
			}
		}
	}
	f.Add(seed)
	forged := make([]byte, 40)
	putHeader(forged, 1, ^uint64(0)-2, MaxGroup, 40)
	f.Add(append([]byte{40}, forged...))
	putHeader(forged, 1, 3, 1, 0xFFFF)
	f.Add(append(append([]byte{40}, forged...), append([]byte{40}, forged...)...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		d := NewDecoder()
		buf := make([]byte, MaxPacket)
		for len(stream) > 0 {
			n := min(int(stream[0]), len(stream)-1)
			pkt := bytes.Clone(stream[1 : 1+n])
			stream = stream[1+n:]
			in, out := 1, 0
			switch {
			case IsParity(pkt):
				d.Parity(pkt)
			case IsTransport(pkt):
				if now, _ := d.Packet(pkt); now {
					out++
				}
			case n == 0:
				d.GiveUp()
			}
			for got := d.Pop(buf); got > 0; got = d.Pop(buf) {
				if out++; got < minPacket || !IsTransport(buf[:got]) {
					t.Fatalf("gives %x", buf[:got])
				}
			}
			if out > in+ring {
				t.Fatalf("%d packets out for one in", out)
			}
		}
	})
}
