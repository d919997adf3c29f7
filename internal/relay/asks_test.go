package relay

import (
	"bytes"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

// Questions are answered after the frames of the same read, and binds before the frames that follow them, though a flood of either
// kind is not answered in full.
func TestAFloodOfQuestionsIsNotAnsweredInFull(t *testing.T) {
	st := newStage(t, func(o *Options) { o.Sockets = 1 })
	client, gateway, session := newUDP(t, st.Addr()), newUDP(t, st.Addr()), newTalk(t)
	mustBind(t, client, session, Client)
	mustBind(t, gateway, session, Gateway)
	stale := AppendBind(nil, Bind{Ticket: session.ticket(t, Client, nil)}, &BindKey{})
	for name, msg := range map[string][]byte{"questions": WantRequest(nat.TxID{1}), "binds": stale} {
		before := st.Stats()
		flood := newUDP(t, st.Addr())
		for i := 0; st.Stats().Unanswered == before.Unanswered; i++ {
			flood.stun(msg)
			if i%50 == 0 { // not faster than it is read, so that nothing is lost on the way
				silent(t, client, gateway, session)
			}
			if i > 200*nat.SourceAnswerRate {
				t.Fatalf("%d %s are all answered", i, name)
			}
		}
		silent(t, client, gateway, session)
		silent(t, gateway, client, session)
	}
	fresh, other := newUDP(t, st.Addr()), newTalk(t)
	time.Sleep(20 * time.Millisecond) // ten answers' worth of time for this address
	mustBind(t, fresh, other, Client)
	fresh.frames(session.channel, bytes.Repeat([]byte{1}, 32))
	silent(t, client, gateway, session)
}
