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
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
)

// flood sends datagrams from a host, as fast as asked for, until stop is called. The kernel cuts each write into 64 of them, so
// that this costs little of the machine that the victim runs on.
type flood struct {
	sent atomic.Int64
	done sync.WaitGroup
	end  chan struct{}
}

// trash is one kind of datagram: its size in bytes, and what fills one.
type trash struct {
	size int
	fill func([]byte)
}

const (
	junkSize  = 32
	junkBatch = 64 // datagrams a write
)

func startFlood(t testing.TB, from *lab.Host, to netip.AddrPort, perSecond int, junk trash) *flood {
	t.Helper()
	conn, err := from.ListenPacket(netip.AddrPortFrom(from.Addr(), 0).String())
	must(t, err)
	f := &flood{end: make(chan struct{})}
	f.done.Go(func() {
		defer conn.Close()
		f.run(conn.(*net.UDPConn), to, perSecond, junk)
	})
	return f
}

func (f *flood) run(conn *net.UDPConn, to netip.AddrPort, perSecond int, junk trash) {
	batch, control := make([]byte, junk.size*junkBatch), segmentSize(uint16(junk.size))
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
			junk.fill(batch[i*junk.size:][:junk.size])
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

// The junk: bytes that mean nothing, frames of channels that nobody has, questions for an address and a nonce, and binds with a
// nonce that is no good.
var junk = map[string]trash{
	"noise":     {junkSize, scramble},
	"frames":    {junkSize, func(b []byte) { binary.BigEndian.PutUint32(b, 0x4<<28|rand.Uint32()>>4); b[4] = 4 }},
	"questions": {len(question), func(b []byte) { copy(b, question); scramble(b[8:20]) }},
	"binds":     {len(staleBind), func(b []byte) { copy(b, staleBind); scramble(b[8:20]) }},
}

var (
	question  = relay.WantRequest(nat.TxID{})
	staleBind = relay.AppendBind(nil, relay.Bind{Ticket: make(relay.Ticket, relay.TicketSize)}, &relay.BindKey{})
)

func scramble(b []byte) {
	for i := 0; i+4 <= len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], rand.Uint32())
	}
}
