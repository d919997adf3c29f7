package nat

import "encoding/binary"

// Tally is what one side of a session has counted of the packets that the other side sends, so that the other side learns how many are
// lost on their way. Whoever sends one knows what to do with parities (package repair). The zero value says nothing.
type Tally struct {
	Known bool
	Sent  uint32 // packets that must have been sent; wraps around
	Came  uint32 // packets that came; wraps around
}

// tallySize is the length of TALLY: packets sent, packets that came.
const tallySize = 4 + 4

// append appends TALLY, unless there is nothing to say.
func (t Tally) append(dst []byte) []byte {
	if !t.Known {
		return dst
	}
	var v [tallySize]byte
	binary.BigEndian.PutUint32(v[:], t.Sent)
	binary.BigEndian.PutUint32(v[4:], t.Came)
	return AppendAttr(dst, attrTally, v[:])
}

// readTally reads TALLY; what has another length says nothing.
func readTally(v []byte) Tally {
	if len(v) != tallySize {
		return Tally{}
	}
	return Tally{Known: true, Sent: binary.BigEndian.Uint32(v), Came: binary.BigEndian.Uint32(v[4:])}
}

// PeekTally gives the tally of a message, of what its MESSAGE-INTEGRITY covers. It does not allocate.
func PeekTally(b []byte) (t Tally) {
	if !IsSTUN(b) {
		return Tally{}
	}
	for a := Walk(b); a.Next() && a.Type != AttrMessageIntegrity; {
		if a.Type == attrTally {
			t = readTally(a.Value)
		}
	}
	return t
}
