package tunnel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/udpconn"
)

const (
	spareReads  = 2                      // datagrams that one system call takes at most once a spare carries packets, each a run
	sampled     = 64                     // spares that ask where they are seen
	sampleWait  = 700 * time.Millisecond // for the last answer
	sparesKept  = 4                      // of one peer, beside those of a round
	spareBroken = time.Minute            // a spare whose path has been lost for so long is closed: its NAT has forgotten it
)

// spare is a socket beside the tunnel's own that was opened for one peer, to have one more port of the NAT. Until an authentic
// check has come in through it, it takes nothing else and costs a few KiB; from then on it moves packets as the tunnel's own does.
type spare struct {
	*socket
	peer *Peer
	quit chan struct{}
	once sync.Once
	id   nat.TxID // of the question where it is seen

	mapped atomic.Uint32 // the port where it is seen; 0 while that is not known
	hit    atomic.Bool   // an authentic check has come in
}

var _ door = (*spare)(nil)

// openSpares opens as many sockets as it can, n at most. Their readers are the tunnel's tasks.
func (p *Peer) openSpares(n int) (list []*spare) {
	for range n {
		c, err := udpconn.Listen(context.Background(), udpconn.Options{Network: "udp4"})
		if err != nil {
			p.tunnel.log.Warn("cannot open a socket for the birthday method", "err", err)
			break
		}
		s := &spare{socket: newSocket(c), peer: p, quit: make(chan struct{}), id: randomID()}
		list = append(list, s)
		p.tunnel.tasks.Go(s.run)
	}
	return list
}

// close closes the socket, which ends its reader.
func (s *spare) close() {
	s.once.Do(func() {
		close(s.quit)
		_ = s.conn.Close()
		s.peer.tunnel.crowd.gone(1)
	})
}

// run takes in what comes until the socket is closed.
func (s *spare) run() {
	buf := make([]byte, nat.MaxMessage)
	for !s.hit.Load() {
		n, from, err := s.conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || !nat.IsSTUN(buf[:n]) {
			continue
		}
		if id, mapped, ok := nat.PeekResponse(buf[:n]); ok && id == s.id {
			s.mapped.Store(uint32(mapped.Port()))
			continue
		}
		s.peer.tunnel.handleSTUN(buf[:n], &route{spot: spot{via: s, remote: from}})
	}
	s.carry()
}

// carry hands packets to the device.
func (s *spare) carry() {
	d := &datagrams{batch: s.conn.NewBatch(spareReads), via: s}
	p := newParcel(d)
	for {
		if err := d.batch.Read(); errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue
		}
		if d.reset(); !s.peer.tunnel.bind.side.hand(p, s.quit) {
			return
		}
	}
}

// sample asks a server where it sees the first spares, and gives the ports that the NAT maps to, as far as that tells.
func sample(list []*spare, server netip.AddrPort, quit <-chan struct{}) ports {
	list = list[:min(len(list), sampled)]
	if !server.IsValid() {
		return ports{}
	}
	for i, s := range list {
		_ = s.send([][]byte{nat.BindingRequest(s.id)}, &route{spot: spot{via: s, remote: server}})
		if i%birthdayBatch == birthdayBatch-1 && !pause(birthdayTick, quit) {
			return ports{}
		}
	}
	var seen []uint16
	for end := time.Now().Add(sampleWait); ; {
		seen = seen[:0]
		for _, s := range list {
			if port := s.mapped.Load(); port != 0 {
				seen = append(seen, uint16(port))
			}
		}
		if len(seen) == len(list) || !time.Now().Before(end) || !pause(birthdayTick, quit) {
			return estimate(seen)
		}
	}
}

// pause waits; false where quit is closed.
func pause(d time.Duration, quit <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-quit:
		return false
	}
}
