package relay

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

// bound is a session's side on a WebSocket that nobody writes to: what it is sent stays in its outbox.
type bound struct {
	*link
	session *talk
	side    Side
	bind    []byte // its BIND
}

func newBound(t *testing.T, s *Server, session *talk, side Side) *bound {
	t.Helper()
	b := &bound{link: newLink(s, netip.MustParseAddr("192.0.2.1")), session: session, side: side}
	b.lonely = time.NewTimer(time.Hour)
	b.bind, _ = bindMessage(t, session, side, Offer{Nonce: b.nonce, Key: s.public}, nil)
	return b
}

// arrive has the relay take the BIND at a moment, and gives what the side is handed.
func (b *bound) arrive(t *testing.T, l *lane, at time.Time) (frame []byte) {
	t.Helper()
	l.now = at.UnixNano()
	answer := l.server.answer(nil, b.bind, origin{link: b.link}, l.now, l.counts)
	if a, ok := ParseAnswer(answer); !ok || a.Code != 0 {
		t.Fatalf("the bind is answered %+v", a)
	}
	l.hand(b.bind, answer, origin{link: b.link})
	msg, _ := b.out.take(make([]byte, headroom, 1<<16))
	if msg == nil {
		return nil
	}
	blocks := WalkBlocks(msg[headroom:])
	blocks.Next()
	return blocks.Data
}

// send has the relay take a frame from the side.
func (b *bound) send(l *lane, at time.Time, size int) (frame []byte) {
	l.now = at.UnixNano()
	frame = bytes.Repeat([]byte{byte(size)}, size)
	PutHeader(frame, b.session.channel)
	l.forward(b.session.channel, frame, size, origin{link: b.link})
	return frame
}

// Whoever binds first finds nobody. What it sent last is there when the other side binds, but nothing large, nothing old, and nothing once
// that side was there.
func TestEarlyFrameWaitsForTheOtherSide(t *testing.T) {
	for name, tc := range map[string]struct {
		sizes []int // are sent a millisecond apart
		after time.Duration
		want  int // size of what the other side gets; 0 for nothing
	}{
		"at once":         {[]int{200}, 0, 200},
		"a moment later":  {[]int{200}, earlyLife - time.Millisecond, 200},
		"too late":        {[]int{200}, earlyLife, 0},
		"one of several":  {[]int{200, 201, 202}, 0, 200},
		"the largest":     {[]int{earlyMost}, 0, earlyMost},
		"too large":       {[]int{earlyMost + 1}, 0, 0},
		"large and small": {[]int{earlyMost + 1, 100}, 0, 100},
	} {
		t.Run(name, func(t *testing.T) {
			st, session, now := newStage(t, nil), newTalk(t), time.Now()
			l := &lane{server: st.Server, counts: &counts{}}
			client, gateway := newBound(t, st.Server, session, Client), newBound(t, st.Server, session, Gateway)
			if got := client.arrive(t, l, now); got != nil {
				t.Fatalf("the first side is handed %d bytes", len(got))
			}
			for i, size := range tc.sizes {
				client.send(l, now.Add(time.Duration(i)*time.Millisecond), size)
			}
			got := gateway.arrive(t, l, now.Add(tc.after))
			if len(got) != tc.want {
				t.Errorf("the other side is handed %d bytes, want %d", len(got), tc.want)
			}
			if again := gateway.arrive(t, l, now); again != nil {
				t.Errorf("it is handed %d bytes once more", len(again))
			}
			st.table.unbind([SessionSize]byte(session.ticket(t, Gateway, nil)[2:]), Gateway, origin{link: gateway.link})
			client.send(l, now.Add(time.Minute), 100)
			if got := gateway.arrive(t, l, now.Add(time.Minute)); got != nil {
				t.Errorf("a side that was there before is handed %d bytes", len(got))
			}
		})
	}
}

// Only the session's other side gets what came early, and only what a side has sent that is bound.
func TestEarlyFrameIsTheSessionsOwn(t *testing.T) {
	st, now := newStage(t, nil), time.Now()
	l := &lane{server: st.Server, counts: &counts{}}
	one, other := newTalk(t), newTalk(t)
	client, stranger := newBound(t, st.Server, one, Client), newBound(t, st.Server, one, Client)
	client.arrive(t, l, now)
	stranger.send(l, now, 100)
	if got := newBound(t, st.Server, other, Gateway).arrive(t, l, now); got != nil {
		t.Errorf("another session is handed %d bytes", len(got))
	}
	if got := newBound(t, st.Server, one, Gateway).arrive(t, l, now); got != nil {
		t.Errorf("%d bytes of a stranger's are handed on", len(got))
	}
	if n := l.counts.stranger.Load(); n != 1 {
		t.Errorf("%d frames of strangers are counted", n)
	}
}

// Over every pair of transports a frame that follows the first BIND reaches the side that binds second. A busy machine may take too
// long for that, so one of many sessions has to show it.
func TestFirstFrameReachesWhoBindsSecond(t *testing.T) {
	for clientWay, newClient := range ways {
		for gatewayWay, newGateway := range ways {
			t.Run(clientWay+" to "+gatewayWay, func(t *testing.T) {
				st := newStage(t, nil)
				for range 50 {
					session := newTalk(t)
					client, gateway := newClient(t, st), newGateway(t, st)
					mustBind(t, client, session, Client)
					client.frames(session.channel, []byte("first"))
					mustBind(t, client, session, Client) // the frame has been handled
					mustBind(t, gateway, session, Gateway)
					client.frames(session.channel, []byte("second"))
					if _, _, pkt := gateway.next(); string(pkt) == "first" {
						return
					}
				}
				t.Error("no session's first frame has arrived")
			})
		}
	}
}
