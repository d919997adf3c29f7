package nat

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/pion/stun/v2"
)

// samples are one message of each kind, all under benchKey.
type samples struct{ plain, check, padded, response []byte }

var (
	benchKey   = bytes.Repeat([]byte{7}, 32)
	benchCheck = Check{ID: TxID{1, 2, 3}, Username: "6Zk0Yd3sJ8mQ2vN1aB5cXw:AbCdEfGh"}
	benchAddr  = netip.MustParseAddrPort("[2001:db8::1]:51820")
)

func makeSamples(tb testing.TB) samples {
	tb.Helper()
	check, err := AppendCheck(nil, benchCheck, benchKey, 0)
	if err != nil {
		tb.Fatal(err)
	}
	padded, err := AppendCheck(nil, benchCheck, benchKey, 1452)
	if err != nil {
		tb.Fatal(err)
	}
	response, err := AppendCheckResponse(nil, benchCheck.ID, benchAddr, Tally{Known: true}, benchKey, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return samples{BindingRequest(benchCheck.ID), check, padded, response}
}

// hotPaths is everything that runs for a packet.
func hotPaths(tb testing.TB) map[string]func() bool {
	s := makeSamples(tb)
	buf := make([]byte, 0, MaxMessage)
	return map[string]func() bool{
		"IsSTUN": func() bool { return IsSTUN(s.check) },
		"PeekUsername": func() bool {
			_, _, ok := PeekUsername(s.check)
			return ok
		},
		"PeekResponse": func() bool {
			_, _, ok := PeekResponse(s.response)
			return ok
		},
		"PeekTally":           func() bool { return PeekTally(s.response).Known },
		"VerifyCheck":         func() bool { return VerifyCheck(s.check, benchKey) },
		"VerifyCheckPadded":   func() bool { return VerifyCheck(s.padded, benchKey) },
		"VerifyCheckForged":   func() bool { return !VerifyCheck(s.padded, benchKey[1:]) },
		"VerifyCheckResponse": func() bool { return VerifyCheck(s.response, benchKey) },
		"AppendCheck": func() bool {
			_, err := AppendCheck(buf, benchCheck, benchKey, 1452)
			return err == nil
		},
		"AppendCheckResponse": func() bool {
			_, err := AppendCheckResponse(buf, benchCheck.ID, benchAddr, Tally{Known: true}, benchKey, 1452)
			return err == nil
		},
		"BindingResponse": func() bool {
			_, _, err := BindingResponse(s.response)
			return err == nil
		},
		"AppendBindingResponse": func() bool {
			_, ok := AppendBindingResponse(buf, s.plain, benchAddr)
			return ok
		},
	}
}

func TestHotPathsDoNotAllocate(t *testing.T) {
	for name, f := range hotPaths(t) {
		t.Run(name, func(t *testing.T) {
			if !f() {
				t.Fatal("does not work at all")
			}
			if n := testing.AllocsPerRun(100, func() { f() }); n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

func BenchmarkHotPath(b *testing.B) {
	for name, f := range hotPaths(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f()
			}
		})
	}
}

// BenchmarkPionVerify is what the module's own decoder and check cost, for comparison.
func BenchmarkPionVerify(b *testing.B) {
	s := makeSamples(b)
	b.ReportAllocs()
	for b.Loop() {
		m := &stun.Message{Raw: s.check}
		if m.Decode() != nil || stun.MessageIntegrity(benchKey).Check(m) != nil {
			b.Fatal("does not verify")
		}
	}
}
