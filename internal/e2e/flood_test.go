//go:build linux

package e2e

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
)

// flood sends datagrams of 32 bytes from a host, as fast as asked for, until stop is called. make fills one datagram. The
// kernel cuts each write into 64 of them, so that this costs little of the machine that the victim runs on.
type flood struct {
	sent atomic.Int64
	done sync.WaitGroup
	end  chan struct{}
}

const (
	junkSize  = 32
	junkBatch = 64 // datagrams a write
)

func startFlood(t testing.TB, from *lab.Host, to netip.AddrPort, perSecond int, fill func(junk []byte)) *flood {
	t.Helper()
	conn, err := from.ListenPacket(netip.AddrPortFrom(from.Addr(), 0).String())
	must(t, err)
	f := &flood{end: make(chan struct{})}
	f.done.Go(func() {
		defer conn.Close()
		f.run(conn.(*net.UDPConn), to, perSecond, fill)
	})
	return f
}

func (f *flood) run(conn *net.UDPConn, to netip.AddrPort, perSecond int, fill func([]byte)) {
	batch, control := make([]byte, junkSize*junkBatch), segmentSize(junkSize)
	began := time.Now()
	for {
		select {
		case <-f.end:
			return
		default:
		}
		due := int64(time.Since(began).Seconds() * float64(perSecond))
		if f.sent.Load() >= due {
			time.Sleep(time.Millisecond)
			continue
		}
		for i := range junkBatch {
			fill(batch[i*junkSize:][:junkSize])
		}
		if _, _, err := conn.WriteMsgUDPAddrPort(batch, control, to); err == nil {
			f.sent.Add(junkBatch)
		}
	}
}

// stop ends the flood and gives how many datagrams it was.
func (f *flood) stop() int64 {
	close(f.end)
	f.done.Wait()
	return f.sent.Load()
}

// segmentSize is the control message that has the kernel cut a write into datagrams (udp(7), UDP_SEGMENT).
func segmentSize(size uint16) []byte {
	b := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], size)
	return b
}

// The junk: bytes that mean nothing, and frames of channels that nobody has.
var junk = map[string]func([]byte){
	"noise": func(b []byte) {
		for i := 0; i+8 <= len(b); i += 8 {
			binary.NativeEndian.PutUint64(b[i:], rand.Uint64())
		}
	},
	"frames": func(b []byte) {
		binary.BigEndian.PutUint32(b, 0x4<<28|rand.Uint32()>>4)
		b[4] = 4
	},
}
