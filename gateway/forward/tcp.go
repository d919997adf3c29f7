package forward

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// Keepalive towards both sides: a peer that has gone is noticed after three minutes.
const (
	keepaliveIdle     = time.Minute
	keepaliveInterval = 15 * time.Second
	keepaliveCount    = 8
)

// handleTCP sees every segment that belongs to no connection, on the goroutine that delivers packets. False leaves the
// segment to the stack, which answers with a reset.
func (f *Forwarder) handleTCP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := endpoints(id)
	flags := header.TCP(pkt.TransportHeader().Slice()).Flags()
	if f.isLocal(dst.Addr()) || flags&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn {
		return false
	}
	s := f.session(src.Addr())
	if s == nil {
		return true // removed since the filter let it in
	}
	if !f.requests.reserve(id) {
		return true // the same job asks again, or the address's next session while the last one's request is being taken down
	}
	key := flowKey{policy.TCP, src, dst}
	fl, why, known := s.admit(key, f.limits.TCPIdle)
	if fl == nil || known {
		f.requests.release(id)
		if known {
			return true
		}
		if why.Reason == reasonHeld {
			return true // the job's next SYN goes to the other gateway
		}
		s.deny(key, why)
		return why.Reason == reasonRate // the job's next SYN finds out
	}
	fl.quote, fl.asked = quoteOf(pkt), header.TCP(pkt.TransportHeader().Slice()).SequenceNumber()
	f.requests.set(id, fl)
	if !f.tcp.HandlePacket(id, pkt) { // hands the flow to serveTCP
		f.requests.release(id)
		fl.close()
		return false
	}
	return true
}

// serveTCP carries one connection: it dials the target and only then completes the job's handshake.
func (f *Forwarder) serveTCP(r *tcp.ForwarderRequest) {
	stretch()
	fl := f.requests.get(r.ID())
	defer fl.close()
	target, err := f.connect(fl, "tcp")
	if err != nil {
		refuse(fl, r, err)
		return
	}
	conn := target.(tcpConn)
	if !fl.onReset(func() { resetConn(conn) }) {
		f.complete(r, true)
		return
	}
	var wq waiter.Queue
	ep := fl.handshake(r, &wq)
	if ep == nil {
		resetConn(conn)
		return
	}
	fl.quote = nil
	if !fl.onReset(ep.Abort) {
		return
	}
	w := newWindow(ep, &fl.s.purse, fl.floors)
	defer w.close()
	re := &relay{
		fl: fl, ep: ep, wq: &wq, conn: conn, window: w,
		turn: turn{turns: f.turns, gate: fl.s.gate}, brisk: brisk{ep: ep},
	}
	fl.onRest(re.rest)
	re.run()
}

// stretch grows the stack of a new goroutine at once to what carrying takes. Otherwise it grows in steps, and each moves all that is on it
// by then: a twentieth of what a short connection costs.
//
//go:noinline
func stretch() {
	var room [12 << 10]byte
	keep(&room)
}

//go:noinline
func keep(*[12 << 10]byte) {}

// refuse shows the job what happened to the dial: a reset where the target refused, an ICMP error where it does not answer.
func refuse(fl *flow, r *tcp.ForwarderRequest, err error) {
	f := fl.s.f
	if fl.ctx.Err() != nil { // the flow was reset, not refused
		f.complete(r, true)
		return
	}
	why := fl.turnAway(err)
	if why == prohibited { // like what is denied before it is dialled
		why = none
	}
	sent := why != none && fl.s.reject(fl.quote, why)
	f.complete(r, !sent)
}

// rest is called now and then while nothing is carried. The first time both sides get their keepalives: most connections are over before,
// and setting them takes as many system calls as carrying a question and an answer.
func (r *relay) rest() {
	r.window.rest()
	r.once.Do(func() {
		keepAlive(r.ep)
		r.keepTarget()
	})
}

func (r *relay) keepTarget() {
	_ = r.conn.SetKeepAliveConfig(net.KeepAliveConfig{ // fails where it is closed
		Enable: true, Idle: keepaliveIdle, Interval: keepaliveInterval, Count: keepaliveCount,
	})
}

func keepAlive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(keepaliveIdle)
	interval := tcpip.KeepaliveIntervalOption(keepaliveInterval)
	_ = ep.SetSockOpt(&idle) // these options exist on every TCP endpoint
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepaliveCount)
	ep.SocketOptions().SetKeepAlive(true)
}

// resetConn closes a connection with a reset.
func resetConn(c tcpConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// errTargetGone says that the target takes nothing more. What it has said before may still be on its way to the job, so
// the other direction decides how the flow ends.
var errTargetGone = errors.New("the target has closed the connection")

// relay copies between a connection of the stack and one of the operating system, with half-close both ways.
type relay struct {
	fl     *flow
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	conn   tcpConn
	window *window
	brisk  brisk     // down's
	once   sync.Once // see rest
	total  int64     // bytes carried to the job
	deaf   bool      // the target takes nothing more; up's, and run's once that has ended
	bulk   bool      // the job sends much; up's
	turn   turn      // up's
}

// run returns when both directions have ended. A direction that fails resets the flow; one that ends well closes its
// half of the other side and lets the opposite direction run on.
func (r *relay) run() {
	var up sync.WaitGroup
	up.Go(func() {
		stretch()
		if r.up() != nil {
			r.fl.reset(wire.CauseReset)
		}
	})
	if r.down() != nil {
		r.fl.reset(wire.CauseReset)
	}
	up.Wait()
	r.end()
}

// end closes both sides. A flow that is reset must not look to either as if all had been said, though whoever resets it may have
// come to one side only so far.
func (r *relay) end() {
	if !r.fl.isDead() {
		_ = r.conn.Close()
		r.settle()
	}
	if r.fl.isDead() {
		resetConn(r.conn)
		r.ep.Abort()
	}
	r.ep.Close()
}

// settle waits until the job has taken all that was sent to it, or the flow is reset. What a job leaves unread is memory of
// this process, so it has to count as an open flow, or closing flows without reading them would get round every limit. The stack says so
// itself where the job was the first to close. What a job goes on to say to a target that is gone is thrown away: with a window
// that stays closed the stack would not take its acknowledgements either.
func (r *relay) settle() {
	entry, gone := waiter.NewChannelEntry(waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&entry)
	defer r.wq.EventUnregister(&entry)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		if r.deaf {
			_, _ = r.ep.Read(io.Discard, tcpip.ReadOptions{}) // all that is there
		}
		switch tcp.EndpointState(r.ep.State()) {
		case tcp.StateFinWait2, tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
			return
		}
		select {
		case <-gone:
		case <-time.After(wait):
		case <-r.fl.ctx.Done():
			return
		}
	}
}

// up copies from the job to the target.
func (r *relay) up() error {
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&entry)
	defer r.wq.EventUnregister(&entry)
	defer r.giveUp()
	drain, err := r.drain()
	for err == nil {
		if err = drain(); err == nil {
			err = r.gather(readable)
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		return r.conn.CloseWrite()
	case errors.Is(err, errTargetGone):
		r.deaf = true
		return nil
	}
	return err
}

// took notes that n bytes have gone to the target.
func (r *relay) took(n int) {
	if r.window.took(n, r.fl.readShare) {
		r.bulk = true
	}
	r.fl.carry(n, 0)
}

// readError says what it means that the stack gives nothing: nil that nothing is there yet, io.EOF that the job has sent all.
func readError(terr tcpip.Error) error {
	switch terr.(type) {
	case *tcpip.ErrWouldBlock:
		return nil
	case *tcpip.ErrClosedForReceive:
		return io.EOF
	}
	return netstack.Errno(terr)
}

// writeError tells a target that has closed the connection from other failures.
func writeError(err error) error {
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return errTargetGone
	}
	return err
}

// down copies from the target to the job.
func (r *relay) down() error {
	entry, writable := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&entry)
	defer r.wq.EventUnregister(&entry)
	err := r.pour(writable)
	if errors.Is(err, io.EOF) {
		return shutdown(r.ep)
	}
	return err
}

// carried notes that n bytes have gone to the job.
func (r *relay) carried(n int) {
	r.fl.carry(0, n)
	r.total += int64(n)
}

// await waits until the stack has room again. A reset wakes it as well.
func (r *relay) await(writable <-chan struct{}) {
	share, full := r.fl.share()
	if r.brisk.look(r.total, time.Now()) {
		share = min(share, briskSend)
	}
	r.window.fit(r.total, share, full)
	<-writable
}

// choke waits until the job has taken the many small pieces that wait for it. Meanwhile the target's bytes gather, so that
// the next piece is larger.
func (r *relay) choke() {
	for wait := time.Millisecond; !r.window.drained(); wait = min(2*wait, 50*time.Millisecond) {
		select {
		case <-time.After(wait):
		case <-r.fl.ctx.Done():
			return
		}
	}
}

// shutdown ends the half of the connection towards the job. One that is gone already needs no ending.
func shutdown(ep tcpip.Endpoint) error {
	switch terr := ep.Shutdown(tcpip.ShutdownWrite); terr.(type) {
	case nil, *tcpip.ErrNotConnected:
		return nil
	default:
		return netstack.Errno(terr)
	}
}
