// Package netstacktest wires two TUN devices together in memory, where WireGuard would be.
package netstacktest

import (
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

// offset is the room that WireGuard leaves in front of each packet.
const offset = 16

// Wire carries packets between two devices.
type Wire struct {
	// Drop, if set before the first packet, is asked about every packet; true loses it. fromA tells the direction. It is
	// called from two goroutines.
	Drop func(fromA bool, packet []byte) bool

	done sync.WaitGroup
}

// Connect moves packets both ways until the devices are closed.
func (w *Wire) Connect(a, b tun.Device) {
	w.done.Go(func() { w.pump(a, b, true) })
	w.done.Go(func() { w.pump(b, a, false) })
}

// Wait returns when both devices have been closed and nothing moves any more.
func (w *Wire) Wait() { w.done.Wait() }

func (w *Wire) pump(from, to tun.Device, fromA bool) {
	n := from.BatchSize()
	bufs, sizes, out := make([][]byte, n), make([]int, n), make([][]byte, 0, n)
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	for {
		n, err := from.Read(bufs, sizes, offset)
		if err != nil {
			return
		}
		out = out[:0]
		for i := range n {
			packet := bufs[i][:offset+sizes[i]]
			if w.Drop == nil || !w.Drop(fromA, packet[offset:]) {
				out = append(out, packet)
			}
		}
		if len(out) > 0 {
			_, _ = to.Write(out, offset) // a closed device takes nothing; the other direction goes on until it is closed too
		}
	}
}
