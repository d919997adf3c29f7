package state

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	votesSubject = "$NRG.V." // and the group: requests for votes, 3 numbers and a candidate; as of nats-server 2.2 to 2.15
	candidate    = "_culvert"
	peerLength   = 8
)

// finding is what an inquiry has found.
type finding struct {
	term    uint64
	reached map[string]bool // by one server, and most members; nil where no server reaches most
	leads   bool            // the leader has said so, and is one of these
	none    bool            // members say that there is no leader
	direct  map[string]bool // that have answered through their own server what they were asked last
	dead    map[string]bool // whose server is dead
	last    string          // who led last
}

// cutOff reports whether a member is dead, or lives and is cut off from most of the others. One that answers nobody may just wait for its disk.
func (f finding) cutOff(peer string) bool {
	return f.reached != nil && !f.reached[peer] && (f.dead[peer] || f.direct[peer])
}

// verdict is what a finding means.
type verdict int

const (
	led  verdict = iota // there is a leader
	busy                // the leader is there, and slow
	late                // it does not answer, and may just wait for its disk
	away                // most members are away
	lost                // there is no leader, or most members do not reach it
)

// verdict judges by who reaches whom: a leader that is dead, frozen or cut off is not reached by most members, and that is all that matters.
func (f finding) verdict(members int, why alarm) verdict {
	switch {
	case 2*len(f.reached) <= members:
		return away
	case f.leads:
		return led
	case f.cutOff(f.last):
		return lost
	case !f.reached[f.last]:
		return late
	case why == callNobody || f.none:
		return lost
	}
	return busy
}

// answer is one member's, through one seat.
type answer struct {
	seat int
	term uint64
	peer string
	last bool // to what was asked last
}

// inquire asks at once, through every server that lives, which members answer and in which term, and whether the leader leads. Where some are missing it asks
// once more: a member answers in the order in which it is asked, and so, when that answer comes through its own server, it has not been asked
// through others, or they do not hear it.
func (e *election) inquire(ctx context.Context) finding {
	f, patience := finding{last: e.leading, dead: e.panel.dead(), direct: map[string]bool{}}, rollCall
	if f.dead[f.last] {
		patience = quickRoll
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	seats, answers := e.panel.living(), make(chan answer, 64)
	stop := e.roll(seats, answers, false)
	said := make(chan *jetstream.ClusterInfo, 1)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	defer stop()
	asking.Go(func() {
		info, err := e.info(ctx)
		if err != nil || info.Cluster == nil {
			close(said)
			return
		}
		said <- info.Cluster
	})
	again := time.After(patience / 2)
	c := count{finding: f, members: e.members, by: make([]map[string]bool, len(seats))}
	for !c.complete() {
		select {
		case a := <-answers:
			c.take(a, seats)
		case info := <-said:
			c.info, c.told, said = info, true, nil
		case <-again:
			defer e.roll(seats, answers, true)()
		case <-ctx.Done():
			c.over = true
		}
	}
	if c.finding.leads {
		e.leading = peerOf(c.info.Leader)
	}
	return c.finding
}

// count adds up answers.
type count struct {
	members    map[string]bool
	by         []map[string]bool // seat: members that have answered through it
	info       *jetstream.ClusterInfo
	told, over bool

	finding finding
}

// take notes an answer.
func (c *count) take(a answer, seats []*seat) {
	if !c.members[a.peer] {
		return
	}
	if c.by[a.seat] == nil {
		c.by[a.seat] = map[string]bool{}
	}
	c.by[a.seat][a.peer] = true
	c.finding.term = max(c.finding.term, a.term)
	if at := seats[a.seat].peer.Load(); a.last && at != nil && *at == a.peer {
		c.finding.direct[a.peer] = true
	}
}

// complete brings the finding up to date, and reports whether nothing more is to come or to be known.
func (c *count) complete() bool {
	f, all := &c.finding, true
	for _, by := range c.by {
		if len(by) > len(f.reached) && 2*len(by) > len(c.members) {
			f.reached = by
		}
		all = all && len(by) == len(c.members)
	}
	if c.info != nil {
		f.none = c.info.Leader == ""
		f.leads = !f.none && f.reached[peerOf(c.info.Leader)]
	}
	return c.over || f.leads || all && c.told
}

// roll asks all members for their term, through each of the seats, with requests for votes that change nothing.
func (e *election) roll(seats []*seat, answers chan<- answer, last bool) (stop func()) {
	var heard []*nats.Subscription
	for i, s := range seats {
		inbox := s.conn.NewInbox()
		sub, err := s.conn.Subscribe(inbox, func(m *nats.Msg) {
			term, peer, ok := parseVote(m.Data)
			if !ok {
				return // or nobody hears this
			}
			select {
			case answers <- answer{i, term, peer, last}:
			default:
			}
		})
		if err == nil {
			heard = append(heard, sub)
			_ = s.conn.PublishRequest(votesSubject+e.group, inbox, voteRequest(0, place{})) // an error says that the connection is broken
		}
	}
	return func() {
		for _, sub := range heard {
			_ = sub.Unsubscribe()
		}
	}
}

// voteRequest asks for votes in a term, for nobody, with a log as long as that; none for a zero one.
func voteRequest(term uint64, log place) []byte {
	b := binary.LittleEndian.AppendUint64(nil, term)
	b = binary.LittleEndian.AppendUint64(b, log.Term)
	b = binary.LittleEndian.AppendUint64(b, log.Index)
	return append(b, candidate...)
}

// parseVote reads a member's answer: its term and its name.
func parseVote(b []byte) (term uint64, peer string, ok bool) {
	if len(b) != 8+peerLength+1 {
		return 0, "", false
	}
	return binary.LittleEndian.Uint64(b), string(b[8 : 8+peerLength]), true
}
