package relay

import (
	"encoding/binary"
	"errors"

	"github.com/culvertnet/culvert/internal/nat"
)

// Sizes on a WebSocket in bytes.
const (
	BlockHeader = 8         // length (4), segment size (2), zero (2), big endian
	MaxMessage  = 256 << 10 // of one message
)

// ErrBlock is what [Blocks] gives for a message that breaks the format.
var ErrBlock = errors.New("malformed relay message")

// AppendBlockHeader starts a block of length bytes. A segment of 0 announces one STUN message, anything else frames of
// that size, header included, of which the last may be shorter.
func AppendBlockHeader(dst []byte, length, segment int) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(length))
	return binary.BigEndian.AppendUint32(dst, uint32(segment)<<16)
}

// putBlockLength writes a new length into the header of a block that has grown.
func putBlockLength(header []byte, length int) { binary.BigEndian.PutUint32(header, uint32(length)) }

// Blocks walks the blocks of one WebSocket message:
//
//	for blocks.Next() {
//		if blocks.Segment == 0 { … one STUN message in blocks.Data … }
//		for frames := blocks.Frames(); frames.Next(); { … frames.Channel, frames.Packet … }
//	}
//	if blocks.Err != nil { … }
//
// It allocates nothing and what it gives is part of the message.
type Blocks struct {
	Data    []byte // of the current block
	Segment int    // its segment size, 0 for a STUN message
	Err     error  // [ErrBlock] where the message is malformed; the walk ends there

	rest []byte
}

// WalkBlocks starts before the first block of a message.
func WalkBlocks(msg []byte) Blocks { return Blocks{rest: msg} }

// Next moves to the next block; false at the end, or where the message is malformed.
func (b *Blocks) Next() bool {
	if len(b.rest) == 0 || b.Err != nil {
		return false
	}
	b.Err = ErrBlock
	if len(b.rest) < BlockHeader {
		return false
	}
	length, segment := binary.BigEndian.Uint32(b.rest), binary.BigEndian.Uint32(b.rest[4:])
	if segment&0xFFFF != 0 || length == 0 || uint64(length) > uint64(len(b.rest)-BlockHeader) {
		return false
	}
	n, size := int(length), int(segment>>16)
	switch {
	case size == 0 && n > nat.MaxMessage:
		return false
	case size != 0 && (size <= FrameHeader || size > MaxFrame):
		return false
	case size != 0 && n%size != 0 && n%size <= FrameHeader:
		return false // the last frame is cut
	}
	end := BlockHeader + n
	b.Data, b.Segment, b.rest, b.Err = b.rest[BlockHeader:end:end], size, b.rest[end:], nil
	return true
}

// Frames walks the frames of the current block.
func (b *Blocks) Frames() Frames {
	if b.Segment == 0 {
		return Frames{}
	}
	return WalkFrames(b.Data, b.Segment)
}

// Frames walks a run of frames of equal size. What is no frame in it is skipped.
type Frames struct {
	Channel Channel
	Packet  []byte // part of the run

	rest    []byte
	segment int
}

// WalkFrames starts before the first frame of a run; segment must be positive.
func WalkFrames(run []byte, segment int) Frames { return Frames{rest: run, segment: segment} }

// Next moves to the next frame; false at the end.
func (f *Frames) Next() (ok bool) {
	for !ok && len(f.rest) > 0 {
		n := min(f.segment, len(f.rest))
		f.Channel, f.Packet, ok = ParseFrame(f.rest[:n:n])
		f.rest = f.rest[n:]
	}
	return ok
}
