package nat

import (
	"net/netip"
	"testing"
	"time"
)

// What one source is answered is bounded, what all are is, and neither takes from others for long.
func TestAnswersAreBounded(t *testing.T) {
	l := NewLimiter()
	now := time.Now().UnixNano()
	ask := func(from netip.Addr, n int) (answered int) {
		for range n {
			if l.Admit(from, now) {
				answered++
			}
		}
		return answered
	}
	loud, quiet := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.7")
	for range 500 { // five seconds
		ask(loud, 2000)
		now += int64(10 * time.Millisecond)
	}
	before := ask(loud, 1000)
	now += int64(time.Second)
	if got := ask(loud, 200_000); before > SourceAnswerRate/10 || got < SourceAnswerRate-1 || got > SourceAnswerRate+1 {
		t.Errorf("a loud source gets %d answers at once and %d after a second", before, got)
	}
	if got := ask(quiet, 10); got != 10 {
		t.Errorf("a quiet one gets %d of 10 besides", got)
	}
	now += int64(time.Minute)
	answered := 0
	for i := range 200_000 { // a crowd of forged sources in one second
		from := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		if l.Admit(from, now+int64(i)*5000) {
			answered++
		}
	}
	if most := AnswerRate + int(AnswerRate*answerBurst/time.Second) + 1; answered > most || answered < AnswerRate*9/10 {
		t.Errorf("%d answers in a second, want at most %d", answered, most)
	}
	a, b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff:1")
	now += int64(time.Minute)
	if got := ask(a, 10_000) + ask(b, 10_000); got > AnswerRate*int(answerBurst)/int(time.Second) {
		t.Errorf("two addresses of one network get %d", got)
	}
	if n := testing.AllocsPerRun(100, func() { l.Admit(loud, now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
