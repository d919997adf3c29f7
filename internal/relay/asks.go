package relay

import (
	"net/netip"

	"github.com/culvertnet/culvert/internal/nat"
)

// maxPostponed is how many questions of one read are answered.
const maxPostponed = 128

// asks are the questions that a reader has come upon and not answered yet, and the bounds on what strangers are answered: questions
// for their address, and binds whose nonce is no good.
type asks struct {
	*nat.Limiter
	postponed []ask
}

// ask is one question. msg is part of the batch that was read last.
type ask struct {
	msg  []byte
	from origin
}

func newAsks() *asks { return &asks{nat.NewLimiter(), make([]ask, 0, maxPostponed)} }

// isQuestion reports a Binding request, the only message that needs no order among others.
func isQuestion(msg []byte) bool {
	return nat.IsSTUN(msg) && nat.MessageType(msg) == nat.TypeBindingRequest
}

// postpone keeps a question until the frames of the same read are on their way, or drops it.
func (l *lane) postpone(msg []byte, from origin) {
	if len(l.asks.postponed) == maxPostponed || !l.asks.Admit(from.addr.Addr(), l.now) {
		l.counts.unanswered.Add(1)
		return
	}
	l.asks.postponed = append(l.asks.postponed, ask{msg, from})
}

// answerPostponed answers what was kept, as long as the batch that it was read with is there.
func (l *lane) answerPostponed() {
	if len(l.asks.postponed) == 0 {
		return
	}
	for _, q := range l.asks.postponed {
		l.reply(q.msg, q.from)
	}
	l.asks.postponed = l.asks.postponed[:0]
	l.flush()
}

// spare reports whether an answer may be sent: one that only says that a nonce is no good goes to anybody who sends anything.
func (l *lane) spare(answer []byte, to netip.Addr) bool {
	if nat.MessageType(answer) != typeBindError || nat.ErrorCode(answer) != CodeStaleNonce || l.asks.Admit(to, l.now) {
		return true
	}
	l.counts.unanswered.Add(1)
	return false
}
