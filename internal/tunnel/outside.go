package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// Device is a WireGuard device outside this process: the kernel's. Each of its peers has for its endpoint a socket of ours, and what the
// device sends there leaves over the path in use; so it need not know of paths, and hears from nobody but us. Its methods are
// safe for concurrent use.
type Device interface {
	// Listen opens a socket that the device can reach and nobody else.
	Listen(ctx context.Context) (*udpconn.Conn, error)
	// Addr is where the device takes packets from such sockets.
	Addr() netip.AddrPort
	// SetKey changes the device's key; it has no peers then.
	SetKey(key wire.PrivateKey) error
	// AddPeer adds a peer whose packets go to endpoint.
	AddPeer(key wire.Key, endpoint netip.AddrPort, allowed []netip.Prefix) error
	// SetAllowedIPs replaces what may be sent to and taken from a peer. What another peer had goes to this one, in one step.
	SetAllowedIPs(key wire.Key, allowed []netip.Prefix) error
	RemovePeer(key wire.Key) error
	// Shake begins a handshake.
	Shake(key wire.Key) error
	// Seen reads what the device knows of a peer.
	Seen(key wire.Key) (Seen, error)
	Close() error
}

// Seen is what a device outside this process knows of a peer.
type Seen struct {
	Handshake time.Time // the last one; zero before the first
	RxBytes   uint64    // WireGuard packets, without UDP and IP headers
	TxBytes   uint64
}

// outsideBatch is how many packets go between the device and a path at a time: a run through a relay, and then some.
const outsideBatch = 64

// outside moves packets between a device outside this process and the paths. Neither direction ever waits for the other.
//
//	device ──► line, a socket for each peer ──► bind.Send ──► path in use
//	device ◄── line of the packet's peer ◄── bind's receive functions ◄── validated paths
type outside struct {
	device Device
	bind   *bind
	ctx    context.Context // ended by close
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu    sync.Mutex
	lines map[wire.Key]*line
}

// line is one peer's socket towards the device.
type line struct {
	*socket
	done chan struct{} // closed when nothing is read from it any more
}

func newOutside(opts *Options, b *bind) (*outside, error) {
	d := &outside{device: opts.Device, bind: b, lines: map[wire.Key]*line{}}
	if err := d.device.SetKey(opts.Key); err != nil {
		return nil, fmt.Errorf("configure the wireguard device: %w", err)
	}
	receivers, _, err := b.Open(opts.Port)
	if err != nil {
		return nil, fmt.Errorf("open udp port %d: %w", opts.Port, err)
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	for _, receive := range receivers {
		d.tasks.Go(func() { d.deliver(receive) })
	}
	return d, nil
}

func (d *outside) setKey(key wire.PrivateKey) error { return d.device.SetKey(key) }

func (d *outside) knows(key wire.Key) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lines[key] != nil
}

func (d *outside) addPeer(p *Peer) error {
	c, err := d.device.Listen(d.ctx)
	if err != nil {
		return err
	}
	l := &line{socket: newSocket(c), done: make(chan struct{})}
	d.mu.Lock()
	closed := d.lines == nil
	if !closed {
		d.lines[p.opts.Key] = l
	}
	d.mu.Unlock()
	if closed {
		_ = c.Close()
		return net.ErrClosed
	}
	p.line.Store(l)
	go func() { // ends with the line, which whoever closes it waits for
		defer close(l.done)
		d.collect(p, l)
	}()
	return d.device.AddPeer(p.opts.Key, c.LocalAddr(), p.opts.AllowedIPs) // where it fails, the peer is removed
}

func (d *outside) setAllowedIPs(p *Peer, prefixes []netip.Prefix) error {
	return d.device.SetAllowedIPs(p.opts.Key, prefixes)
}

func (d *outside) removePeer(p *Peer) {
	d.mu.Lock()
	l := d.lines[p.opts.Key]
	delete(d.lines, p.opts.Key)
	d.mu.Unlock()
	if l == nil {
		return
	}
	_ = d.device.RemovePeer(p.opts.Key) // it was never added, or the device is gone
	p.line.Store(nil)
	l.end()
}

func (l *line) end() {
	_ = l.conn.Close()
	<-l.done
}

func (d *outside) shake(p *Peer) { _ = d.device.Shake(p.opts.Key) } // the first packet will start one

func (d *outside) status(p *Peer, s *Status) {
	seen, err := d.device.Seen(p.opts.Key)
	if err == nil {
		s.Handshake, s.RxBytes, s.TxBytes = seen.Handshake, seen.RxBytes, seen.TxBytes
	}
}

func (d *outside) close() {
	d.cancel()
	_ = d.bind.Close()
	d.mu.Lock()
	lines := d.lines
	d.lines = nil
	d.mu.Unlock()
	for _, l := range lines {
		l.end()
	}
	d.tasks.Wait()
	_ = d.device.Close()
}

// room is memory for a batch. Each has 64 KiB, so that a run can be gathered in any of them; what is not written to takes no memory.
func room(n int) [][]byte {
	memory := make([]byte, n<<16)
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = memory[i<<16 : (i+1)<<16 : (i+1)<<16]
	}
	return bufs
}

// deliver hands the device what comes from validated paths, until the bind is closed.
func (d *outside) deliver(receive conn.ReceiveFunc) {
	bufs, sizes, from := room(outsideBatch), make([]int, outsideBatch), make([]conn.Endpoint, outsideBatch)
	batch := make([][]byte, 0, outsideBatch)
	to := &route{spot: spot{remote: d.device.Addr()}}
	for {
		n, err := receive(bufs, sizes, from)
		if err != nil {
			return // only net.ErrClosed, see [bind.receive]
		}
		for first := 0; first < n; {
			batch = batch[:0]
			for i := first; i < n && from[i] == from[first]; i++ {
				batch = append(batch, bufs[i][:sizes[i]])
			}
			first += len(batch)
			if l := from[first-1].(*Peer).line.Load(); l != nil {
				_ = l.send(batch, to) // what the device does not take is lost, as on any path
			}
		}
	}
}

// collect sends what the device sends to a peer, until the line is closed.
func (d *outside) collect(p *Peer, l *line) {
	in := l.conn.NewBatch(outsideBatch)
	out := outbox{peer: p, bufs: room(outsideBatch)}
	device := d.device.Addr()
	for {
		if err := in.Read(); errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			select { // the next one may succeed
			case <-time.After(readPause):
				continue
			case <-d.ctx.Done():
				return
			}
		}
		for i := range in.Len() {
			got := in.Datagram(i)
			if got.From != device {
				d.bind.counts.stranger.Add(1)
				continue
			}
			for rest := got.Data; len(rest) > 0; {
				n := min(got.Segment, len(rest))
				out.add(rest[:n])
				rest = rest[n:]
			}
		}
		out.flush()
	}
}

// outbox gathers a peer's packets. Those that go together are of one key, as wireguard-go's are, and handshake messages go alone: see
// [handshake.sending].
type outbox struct {
	peer *Peer
	bufs [][]byte
	n    int
}

func (o *outbox) add(pkt []byte) {
	if !isWireGuard(pkt) {
		return // nothing that a device sends
	}
	if o.n == len(o.bufs) || o.n > 0 && kindOf(pkt) != kindOf(o.bufs[0]) {
		o.flush()
	}
	o.bufs[o.n] = append(o.bufs[o.n][:0], pkt...)
	if o.n++; messageType(pkt) != device.MessageTransportType {
		o.flush()
	}
}

// kindOf is a message's type and the receiver's index, which names the key.
func kindOf(pkt []byte) uint64 { return binary.LittleEndian.Uint64(pkt) }

func (o *outbox) flush() {
	if o.n > 0 {
		_ = o.peer.tunnel.bind.Send(o.bufs[:o.n], o.peer) // what finds no path is lost, and counted
		o.n = 0
	}
}
