package nat

import (
	"encoding/binary"

	"github.com/culvertnet/culvert/internal/wire"
)

// Behind is what one side of a session tells the other of the NAT in front of it, to find a way through two NATs of which at
// least one is hard. It goes in checks, so that only the other side can say it. The zero value says nothing.
type Behind struct {
	Mapping wire.Mapping
	Ready   bool   // the sender has done what it has to before ports are tried
	Round   uint8  // numbers the tries of one session; the side that follows repeats it
	Low     uint16 // the ports that a hard NAT maps to, as far as known; both 0 where they are not
	High    uint16
}

// Known reports whether anything is said.
func (b Behind) Known() bool { return b.Mapping != wire.MappingUnknown }

// behindSize is the length of BEHIND: flags, round, lowest port, highest port.
const (
	behindSize  = 1 + 1 + 2 + 2
	behindEasy  = 1
	behindHard  = 2
	behindReady = 4
)

// append appends BEHIND, unless there is nothing to say.
func (b Behind) append(dst []byte) []byte {
	var v [behindSize]byte
	switch b.Mapping {
	case wire.MappingEasy:
		v[0] = behindEasy
	case wire.MappingHard:
		v[0] = behindHard
	default:
		return dst
	}
	if b.Ready {
		v[0] |= behindReady
	}
	v[1] = b.Round
	binary.BigEndian.PutUint16(v[2:], b.Low)
	binary.BigEndian.PutUint16(v[4:], b.High)
	return AppendAttr(dst, attrBehind, v[:])
}

// readBehind reads BEHIND; what makes no sense says nothing.
func readBehind(v []byte) Behind {
	if len(v) != behindSize {
		return Behind{}
	}
	b := Behind{
		Ready: v[0]&behindReady != 0, Round: v[1],
		Low: binary.BigEndian.Uint16(v[2:]), High: binary.BigEndian.Uint16(v[4:]),
	}
	switch v[0] &^ behindReady {
	case behindEasy:
		b.Mapping = wire.MappingEasy
	case behindHard:
		b.Mapping = wire.MappingHard
	default:
		return Behind{}
	}
	if b.Low > b.High || (b.Low == 0) != (b.High == 0) {
		return Behind{}
	}
	return b
}
