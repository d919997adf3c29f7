package relay

import (
	"errors"
	"net"
	"time"

	"github.com/culvertnet/culvert/internal/udpconn"
)

const (
	readBatch = 32 // datagrams or runs of one read, 64 KiB each
	sendQueue = 64 // of one send
	arenaSize = 16 << 10

	// readPause keeps a socket that fails for good from taking a whole core.
	readPause = 5 * time.Millisecond
)

// port is one UDP socket and its reader.
type port struct {
	server *Server
	conn   *udpconn.Conn
	counts counts
	pool   lanes // for WebSockets that send through this socket
}

func newPort(s *Server, c *udpconn.Conn) *port {
	p := &port{server: s, conn: c}
	p.pool.New = func() any { return &lane{server: s, counts: &s.counts, queue: c.NewQueue(8)} }
	return p
}

// read is the reader.
func (p *port) read() {
	batch := p.conn.NewBatch(readBatch)
	l := &lane{
		server: p.server, counts: &p.counts, queue: p.conn.NewQueue(sendQueue), arena: make([]byte, 0, arenaSize), shares: &shares{},
		asks: newAsks(),
	}
	for {
		switch err := batch.Read(); {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			p.server.log.Debug("relay read failed", "err", err)
			time.Sleep(readPause)
			continue
		}
		l.now = time.Now().UnixNano()
		l.shares.read(l.now, batch.Len() == readBatch)
		for i := range batch.Len() {
			l.datagram(batch.Datagram(i))
		}
		l.flush()
		l.answerPostponed()
	}
}

// datagram takes what one read gave: frames or STUN messages, of which the kernel may have joined several.
func (l *lane) datagram(d udpconn.Datagram) {
	l.runs(d.Data, d.Segment, origin{addr: d.From, local: d.Local})
}

// runs takes data apart: runs of frames of one channel are forwarded, STUN messages over UDP are answered.
func (l *lane) runs(data []byte, segment int, from origin) {
	for len(data) > 0 {
		first := data[:min(segment, len(data))]
		if IsFrame(first) {
			n := runLength(data, segment)
			l.forward(channelIn(first), data[:n:n], segment, from)
			data = data[n:]
			continue
		}
		if from.link == nil {
			l.message(first, from)
		} else {
			l.counts.junk.Add(1)
		}
		data = data[len(first):]
	}
}

// runLength is how many bytes at the start of data are frames of the first one's channel.
func runLength(data []byte, segment int) int {
	n := min(segment, len(data))
	for n < len(data) {
		next := data[n:min(n+segment, len(data))]
		if len(next) <= FrameHeader || [FrameHeader]byte(next) != [FrameHeader]byte(data) {
			break
		}
		n += len(next)
	}
	return n
}

// message takes a datagram that is no frame. Questions wait until all frames of the same read are sent.
func (l *lane) message(msg []byte, from origin) {
	l.shares.stranger(len(msg))
	if isQuestion(msg) {
		l.postpone(msg, from)
		return
	}
	l.reply(msg, from)
}

// reply answers a STUN message, if there is an answer to it.
func (l *lane) reply(msg []byte, from origin) {
	if cap(l.arena)-len(l.arena) < maxAnswer {
		l.flush()
	}
	start := len(l.arena)
	l.arena = l.server.answer(l.arena, msg, from, l.now, l.counts)
	if answer := l.arena[start:]; len(answer) > 0 && l.spare(answer, from.addr.Addr()) {
		l.queue.Add(answer, len(answer), from.addr, from.local)
		l.hand(msg, answer, from)
	}
}
