package nat

import (
	"bytes"
	"testing"

	"github.com/pion/stun/v2"

	"github.com/culvertnet/culvert/internal/wire"
)

// seed adds one message of each kind, the RFC's samples and some broken ones.
func seed(f *testing.F) {
	f.Helper()
	s := makeSamples(f)
	told := benchCheck
	told.Behind = Behind{Mapping: wire.MappingHard, Ready: true, Round: 1, Low: 30000, High: 30999}
	told.Tally = Tally{Known: true, Sent: 1000, Came: 990}
	behind, err := AppendCheck(nil, told, benchKey, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(behind)
	told.Handshake = bytes.Repeat([]byte{1}, 148)
	carries, err := AppendCheck(nil, told, benchKey, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(carries)
	for _, b := range [][]byte{
		s.plain, s.check, s.padded, s.response, s.check[:len(s.check)-1], s.check[:headerSize], nil,
		[]byte(rfc5769Request), []byte(rfc5769Response4), []byte(rfc5769Response6),
		stun.MustBuild(stun.TransactionID, stun.BindingError, stun.CodeUnknownAttribute).Raw,
	} {
		f.Add(b)
	}
}

func FuzzPeekUsername(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		name, id, ok := PeekUsername(b)
		if !bytes.Equal(b, before) {
			t.Fatal("wrote to its input")
		}
		if !ok {
			return
		}
		// what we take, pion takes, and reads alike
		m := &stun.Message{Raw: bytes.Clone(b)}
		if err := m.Decode(); err != nil {
			t.Fatalf("pion refuses: %v", err)
		}
		if v, err := m.Get(stun.AttrUsername); err != nil || !bytes.Equal(v, name) || TxID(m.TransactionID) != id {
			t.Fatalf("pion reads %q (%v), we %q", v, err, name)
		}
	})
}

func FuzzPeekAsked(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		asked, carried := PeekAsked(b), PeekHandshake(b)
		if len(carried) > MaxHandshake || !bytes.Contains(b, carried) {
			t.Fatalf("carries %x", carried)
		}
		if !bytes.Equal(b, before) {
			t.Fatal("wrote to its input")
		}
		if w := asked.Behind; !w.Mapping.Valid() || w.Low > w.High || !w.Known() && w != (Behind{}) {
			t.Fatalf("believes %+v", w)
		}
		if asked.Behind.Known() && readBehind(asked.Behind.append(nil)[attrHeader:][:behindSize]) != asked.Behind {
			t.Fatalf("%+v does not come back", asked.Behind)
		}
	})
}

func FuzzVerifyCheck(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		ok := VerifyCheck(b, benchKey)
		if !bytes.Equal(b, before) {
			t.Fatal("wrote to its input")
		}
		if !ok {
			return
		}
		// a stronger peer would have to forge an HMAC: whatever verifies carries one that pion computes too
		m := &stun.Message{Raw: bytes.Clone(b)}
		if err := m.Decode(); err == nil && stun.MessageIntegrity(benchKey).Check(m) != nil {
			t.Fatalf("pion refuses %x", b)
		}
	})
}

func FuzzResponse(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		id, mapped, ok := PeekResponse(b)
		id2, mapped2, err := BindingResponse(b)
		if !bytes.Equal(b, before) {
			t.Fatal("wrote to its input")
		}
		if ok && (err != nil || id != id2 || mapped != mapped2 || !mapped.IsValid()) {
			t.Fatalf("two readings of one message: %v, %v (%v)", mapped, mapped2, err)
		}
		if !ok {
			return
		}
		again, err := AppendCheckResponse(nil, id, mapped, PeekTally(b), benchKey, 0)
		if err != nil {
			t.Fatal(err)
		}
		if id3, mapped3, ok := PeekResponse(again); !ok || id3 != id || mapped3 != mapped || PeekTally(again) != PeekTally(b) {
			t.Fatalf("%v comes back as %v", mapped, mapped3)
		}
	})
}

func FuzzServer(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		response, ok := AppendBindingResponse(nil, b, benchAddr)
		if !ok {
			return
		}
		if id, mapped, err := BindingResponse(response); err != nil || mapped != benchAddr || !bytes.Equal(id[:], b[8:20]) {
			t.Fatalf("answers %x with %x", b, response)
		}
	})
}
