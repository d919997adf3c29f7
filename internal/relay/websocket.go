package relay

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // the handshake of RFC 6455 wants it; nothing rests on it
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/cork"
)

// socket is an open WebSocket (RFC 6455) of either end, for binary messages only. It is written here rather than taken
// from a library because of what a relay does with it: a message of 64 KiB is written in one piece from the buffer in
// which it was gathered, masked in place, where libraries copy it through a buffer of 4 KiB, with a TLS record and a
// system call for each.
//
// One goroutine reads and any number write. A socket that hears nothing for deadAfter closes itself.
type socket struct {
	conn   io.ReadWriteCloser
	in     *bufio.Reader
	corked *cork.Conn // below TLS; nil where there is no TLS, or nothing to be corked
	quick  func()     // acknowledges what was received at once
	client bool       // masks what it sends and takes unmasked frames; a server does the opposite (section 5.1)

	write sync.Mutex             // keeps frames whole
	owed  atomic.Pointer[[]byte] // what the last ping held that has not been answered
	dead  *time.Timer
	once  sync.Once
	err   error // of closing
}

// Frame layout (section 5.2).
const (
	finBit  = 0x80
	maskBit = 0x80

	opContinuation = 0x0
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA

	// headroom is what writeMessage needs before a message: the longest header and mask.
	headroom = 2 + 8 + 4

	maxPayload = 125 // of a control frame
)

// Reasons for closing (section 7.4.1).
const (
	closeGoingAway = 1001
	closeProtocol  = 1002
	closePolicy    = 1008
)

var errSocket = errors.New("websocket protocol error")

// errClosed is what a read gives after the other side has said that it closes.
var errClosed = errors.New("the other side closed the websocket")

func newSocket(conn io.ReadWriteCloser, in *bufio.Reader, client bool) *socket {
	s := &socket{conn: conn, in: in, client: client, quick: func() {}}
	s.dead = time.AfterFunc(deadAfter, func() { _ = conn.Close() })
	return s
}

// over tells what the socket's connection stands on: records of TLS that make up one message leave in one piece.
func (s *socket) over(conn net.Conn) *socket {
	if t := tcpOf(conn); t != nil {
		s.quick = cork.Acknowledger(t)
	}
	if _, ok := conn.(*tls.Conn); ok {
		s.corked = cork.Of(conn)
	}
	return s
}

// close closes the connection, which ends reads and writes.
func (s *socket) close() error {
	s.once.Do(func() {
		s.dead.Stop()
		if s.corked != nil {
			s.corked.Interrupt()
		}
		s.err = s.conn.Close()
	})
	return s.err
}

// bye tells the other side why, if that does not have to wait, and closes.
func (s *socket) bye(code uint16, reason string) error {
	if s.write.TryLock() {
		done := time.AfterFunc(time.Second, func() { _ = s.close() })
		_ = s.frame(opClose, append(binary.BigEndian.AppendUint16(nil, code), reason...))
		done.Stop()
		s.write.Unlock()
	}
	return s.close()
}

// writeMessage writes one binary message: buf without its first headroom bytes. It overwrites buf.
func (s *socket) writeMessage(buf []byte) error {
	s.write.Lock()
	err := s.frameInPlace(opBinary, buf)
	s.write.Unlock()
	if err != nil {
		return err
	}
	return s.pong()
}

// ping asks for a sign of life.
func (s *socket) ping() error {
	s.write.Lock()
	err := s.frame(opPing, nil)
	s.write.Unlock()
	if err != nil {
		return err
	}
	return s.pong()
}

// pong answers the last ping, unless a frame is being written, which may take long: then whoever writes it answers afterwards
// (section 5.5.3).
func (s *socket) pong() error {
	for s.owed.Load() != nil && s.write.TryLock() {
		var err error
		if payload := s.owed.Swap(nil); payload != nil {
			err = s.frame(opPong, *payload)
		}
		s.write.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// frame writes a control frame.
func (s *socket) frame(op byte, payload []byte) error {
	var buf [headroom + maxPayload]byte
	n := copy(buf[headroom:], payload)
	return s.frameInPlace(op, buf[:headroom+n])
}

// frameInPlace writes a frame in one piece: the header goes right before the payload, into buf's headroom.
func (s *socket) frameInPlace(op byte, buf []byte) error {
	payload := buf[headroom:]
	at := headroom
	mark := byte(0)
	if s.client {
		mark = maskBit
		at -= 4
		var key [4]byte
		_, _ = rand.Read(key[:])
		copy(buf[at:], key[:])
		mask(payload, key)
	}
	switch n := len(payload); {
	case n <= maxPayload:
		at--
		buf[at] = mark | byte(n)
	case n <= 1<<16-1:
		at -= 3
		buf[at] = mark | 126
		binary.BigEndian.PutUint16(buf[at+1:], uint16(n))
	default:
		at -= 9
		buf[at] = mark | 127
		binary.BigEndian.PutUint64(buf[at+1:], uint64(n))
	}
	at--
	buf[at] = finBit | op
	return s.put(buf[at:])
}

// record is what one record of TLS holds at most (RFC 8446, section 5.1).
const record = 16 << 10

// put writes to the connection.
func (s *socket) put(b []byte) error {
	if s.corked == nil || len(b) <= record {
		_, err := s.conn.Write(b)
		return err
	}
	s.corked.Cork()
	_, err := s.conn.Write(b)
	if sent := s.corked.Uncork(); err == nil {
		err = sent
	}
	return err
}

// maskBlock is how much is masked at a time.
const maskBlock = 512

// mask applies a masking key (section 5.3).
func mask(b []byte, key [4]byte) {
	var pattern [maskBlock]byte
	for i := 0; i < min(len(pattern), len(b)); i += 4 {
		copy(pattern[i:], key[:])
	}
	for len(b) > 0 {
		b = b[subtle.XORBytes(b, b, pattern[:]):]
	}
}

// readMessage reads the next message into buf, which grows as needed up to [MaxMessage], answers pings on the way and
// gives errClosed once the other side closes.
func (s *socket) readMessage(buf []byte) ([]byte, error) {
	h, err := s.await()
	if err != nil {
		return buf[:0], err
	}
	return s.body(buf, h)
}

// await waits for the next message and gives its first header. Who waits with it needs no buffer meanwhile.
func (s *socket) await() (frameHeader, error) {
	s.rest()
	h, err := s.nextData()
	if err == nil && h.op != opBinary {
		err = fmt.Errorf("%w: unexpected frame type %d", errSocket, h.op)
	}
	return h, err
}

// rest returns when there is something to read. It waits below TLS, because a goroutine that waits inside of it keeps twice the stack.
func (s *socket) rest() {
	if s.corked == nil {
		return
	}
	for {
		s.corked.Dry(true)
		_, err := s.in.Peek(1)
		s.corked.Dry(false)
		if !errors.Is(err, cork.ErrDry) {
			return // an error comes again when it is read
		}
		s.corked.Await()
	}
}

// quickSize is the size of messages, in bytes, that are acknowledged at once. A proxy that keeps TCP_NODELAY off holds back what follows
// a small message until that is acknowledged, for which a receiver that has nothing to say takes 40 ms. Where much comes in it does
// not matter.
const quickSize = 4 << 10

// body reads the message that starts with h into buf, which grows as needed.
func (s *socket) body(buf []byte, h frameHeader) (_ []byte, err error) {
	buf = buf[:0]
	for {
		if h.size > uint64(MaxMessage-len(buf)) {
			return buf, fmt.Errorf("%w: a message of more than %d bytes", errSocket, MaxMessage)
		}
		if buf, err = s.readPayload(buf, h); err != nil || h.fin {
			if len(buf) <= quickSize {
				s.quick()
			}
			return buf, err
		}
		if h, err = s.nextData(); err != nil {
			return buf, err
		}
		if h.op != opContinuation {
			return buf, fmt.Errorf("%w: unexpected frame type %d", errSocket, h.op)
		}
	}
}

// nextData gives the header of the next frame that is no control frame; those it handles.
func (s *socket) nextData() (frameHeader, error) {
	for {
		h, err := s.readHeader()
		if err != nil {
			return h, err
		}
		s.dead.Reset(deadAfter)
		if h.op < opClose {
			return h, nil
		}
		if err := s.control(h); err != nil {
			return h, err
		}
	}
}

// firstRead is how much room a payload gets before any of it has come, in bytes.
const firstRead = 2 << 10

// readPayload appends a frame's payload to buf. The buffer grows with what has come, not with what is announced: a few bytes announce 256 KiB.
func (s *socket) readPayload(buf []byte, h frameHeader) ([]byte, error) {
	start, end := len(buf), len(buf)+int(h.size)
	for at := start; at < end; at = len(buf) {
		to := min(end, max(cap(buf), 2*at, firstRead))
		if to > cap(buf) {
			buf = append(make([]byte, 0, sizeFor(to)), buf...)
		}
		buf = buf[:to]
		if _, err := io.ReadFull(s.in, buf[at:]); err != nil {
			return buf, fmt.Errorf("read a message: %w", err)
		}
	}
	if !s.client {
		mask(buf[start:], h.mask)
	}
	return buf, nil
}

// sizeFor rounds a buffer's size up, so that it seldom grows again.
func sizeFor(n int) int {
	size := 2 << 10
	for size < n {
		size *= 2
	}
	return size
}

type frameHeader struct {
	fin  bool
	op   byte
	size uint64
	mask [4]byte
}

func (s *socket) readHeader() (h frameHeader, err error) {
	var b [8]byte
	if _, err := io.ReadFull(s.in, b[:2]); err != nil {
		return h, fmt.Errorf("read a message: %w", err)
	}
	h.fin, h.op, h.size = b[0]&finBit != 0, b[0]&0xF, uint64(b[1]&^maskBit)
	masked := b[1]&maskBit != 0
	if b[0]&0x70 != 0 || masked == s.client || h.op > opBinary && h.op < opClose || h.op > opPong {
		return h, fmt.Errorf("%w: frame header %x", errSocket, b[:2])
	}
	if h.op >= opClose && (!h.fin || h.size > maxPayload) {
		return h, fmt.Errorf("%w: a control frame that is too long or in parts", errSocket)
	}
	switch h.size {
	case 126:
		_, err = io.ReadFull(s.in, b[:2])
		h.size = uint64(binary.BigEndian.Uint16(b[:]))
	case 127:
		_, err = io.ReadFull(s.in, b[:8])
		h.size = binary.BigEndian.Uint64(b[:])
	}
	if err == nil && masked {
		_, err = io.ReadFull(s.in, h.mask[:])
	}
	if err != nil {
		return h, fmt.Errorf("read a message: %w", err)
	}
	return h, nil
}

// control handles a control frame (section 5.5).
func (s *socket) control(h frameHeader) error {
	var b [maxPayload]byte
	payload := b[:h.size]
	if _, err := io.ReadFull(s.in, payload); err != nil {
		return fmt.Errorf("read a control frame: %w", err)
	}
	if !s.client {
		mask(payload, h.mask)
	}
	switch h.op {
	case opClose:
		return errClosed
	case opPing:
		owed := bytes.Clone(payload)
		s.owed.Store(&owed)
		return s.pong()
	}
	return nil
}

// acceptKey is what a server answers to Sec-WebSocket-Key (section 4.2.2).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // as above
	return base64.StdEncoding.EncodeToString(sum[:])
}
