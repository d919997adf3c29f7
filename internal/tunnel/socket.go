package tunnel

import (
	"encoding/binary"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/udpconn"
)

// batched says that several datagrams go with one system call, and several packets in one datagram that the kernel segments.
const batched = runtime.GOOS == "linux"

// sendWait is how long packets wait for a network device that is full, before they are dropped. Meanwhile the TUN is not read,
// and senders notice.
const sendWait = 500 * time.Millisecond

// sendRuns is how many runs of datagrams go with one system call; a batch of full-sized packets is three.
const sendRuns = 4

// socket is a UDP socket to send on, from any number of goroutines. It is a [door] where it belongs to one peer.
type socket struct {
	conn    *udpconn.Conn
	senders sync.Pool // of *sender
	dropped atomic.Uint64
}

// sender is what one goroutine at a time sends with.
type sender struct {
	queue *udpconn.Queue
	lost  uint64 // what queue has dropped so far
}

func newSocket(c *udpconn.Conn) *socket {
	s := &socket{conn: c}
	s.senders.New = func() any { return &sender{queue: c.NewQueue(sendRuns)} }
	return s
}

// send sends packets, each behind the route's header if it has one. Neighbours of one size become one run, gathered in the first
// one's buffer: wireguard-go's hold 64 KiB.
func (s *socket) send(packets [][]byte, r *route) error {
	q := s.senders.Get().(*sender)
	defer s.senders.Put(q)
	for len(packets) > 0 {
		run, n := gather(packets, r.header)
		size := len(packets[0])
		if r.header != 0 {
			size += relay.FrameHeader
		}
		q.queue.Add(run, size, r.remote, r.local)
		packets = packets[n:]
	}
	q.queue.FlushWait(sendWait)
	if lost := q.queue.Dropped - q.lost; lost > 0 {
		q.lost = q.queue.Dropped
		s.dropped.Add(lost)
	}
	return nil
}

// gather makes one run of the first packets, as many as go together, and tells how many these are. header stands before each of
// them if it is not 0.
func gather(packets [][]byte, header uint32) (run []byte, n int) {
	run = framed(packets[0], header)
	size := len(run)
	for n = 1; batched && n < len(packets) && n < udpconn.MaxSegments; n++ {
		next := len(packets[n])
		if header != 0 {
			next += relay.FrameHeader
		}
		if next > size || len(run)+next > min(cap(run), udpconn.MaxRun) {
			break
		}
		if header != 0 {
			run = binary.BigEndian.AppendUint32(run, header)
		}
		run = append(run, packets[n]...)
		if next < size {
			return run, n + 1 // a shorter one ends the run
		}
	}
	return run, n
}

// framed puts a header before a packet, if there is one, within the packet's own buffer where that has room.
func framed(packet []byte, header uint32) []byte {
	if header == 0 {
		return packet
	}
	n := len(packet) + relay.FrameHeader
	var out []byte
	if cap(packet) >= n {
		out = packet[:n]
	} else {
		out = make([]byte, n) // a handshake
	}
	copy(out[relay.FrameHeader:], packet)
	binary.BigEndian.PutUint32(out, header)
	return out
}
