package state

import (
	"context"
	"encoding/json"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	placesSubject = "$SYS.REQ.SERVER.PING.RAFTZ" // each server tells how far its members are; as of nats-server 2.11 to 2.15
	whoSubject    = "$SYS.REQ.USER.INFO"         // and this of which account one is
	placesCall    = 60 * time.Millisecond        // for members that are reached
	placesEvery   = 50 * time.Millisecond
	maxPlace      = 64 << 10 // bytes of an answer
	maxUnplaced   = 3        // times that none comes
)

// place is how far a member has got, by its own word.
type place struct {
	Peer      string `json:"id"`
	State     string `json:"state"`
	Committed uint64 `json:"committed"`
	Term      uint64 `json:"pterm"` // of its last entry
	Index     uint64 `json:"pindex"`
}

func (p place) behind(other place) bool {
	return p.Term < other.Term || p.Term == other.Term && p.Index < other.Index
}

// places asks the members that are reached how far they are. Those that do not say so in time are left out, all where the user may not ask.
func (e *election) places(ctx context.Context, f finding) map[string]place {
	out := map[string]place{}
	if e.account == "" {
		return out
	}
	question, err := json.Marshal(map[string]string{"account": e.account, "group": e.group})
	if err != nil {
		return out
	}
	conn := e.panel.first(f.cutOff)
	inbox, answers := conn.NewInbox(), make(chan *nats.Msg, maxServers)
	sub, err := conn.ChanSubscribe(inbox, answers)
	if err != nil {
		return out
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := conn.PublishRequest(placesSubject, inbox, question); err != nil {
		return out
	}
	for over := time.After(placesCall); len(out) < len(f.reached); {
		select {
		case m := <-answers:
			if p, ok := parsePlace(m.Data, e.account, e.group); ok && f.reached[p.Peer] {
				out[p.Peer] = p
			}
		case <-over:
			return out
		case <-ctx.Done():
			return out
		}
	}
	return out
}

// parsePlace reads a server's answer.
func parsePlace(b []byte, account, group string) (place, bool) {
	var says struct {
		Data map[string]map[string]place `json:"data"`
	}
	if len(b) > maxPlace || json.Unmarshal(b, &says) != nil {
		return place{}, false
	}
	p := says.Data[account][group]
	return p, p.Peer != ""
}

// sitsOut gives the best log of those that are behind the best, zero where none is. Whoever is asked for a vote with such a log grants it, where it is not ahead of
// it, and then waits for seconds before it stands; those that are ahead stand. So nobody stands in vain, and takes a vote away.
func sitsOut(places map[string]place) (second place) {
	var first place
	for _, p := range places {
		if first.behind(p) {
			first = p
		}
	}
	for _, p := range places {
		if p.behind(first) && second.behind(p) {
			second = p
		}
	}
	return second
}

// waits reports whether a member has won, and everybody has what it has, but it has not heard so, and does not lead before it has. It hears in answer to its next
// heartbeat, which is a second after its election, where it had to bring another one up to date.
func waits(places map[string]place, living int) bool {
	if len(places) < living {
		return false
	}
	for _, p := range places {
		if p.State != "LEADER" || p.Committed >= p.Index {
			continue
		}
		for _, other := range places {
			if other.behind(p) {
				return false
			}
		}
		return true
	}
	return false
}

// lookOut gives the term in which somebody has won and waits, by two answers one after the other, until ctx ends.
func (e *election) lookOut(ctx context.Context, f finding, won chan<- uint64) {
	var seen uint64
	for ; ctx.Err() == nil && e.account != ""; pause(ctx, placesEvery) {
		term, stands := e.stand.somebody()
		switch {
		case !stands || !waits(e.places(ctx, f), len(f.reached)):
			seen = 0
		case seen == term:
			won <- term
			return
		default:
			seen = term
		}
	}
}

// lookAtPlaces learns which account leases and log lie in, and gives up asking members how far they are where they never say so.
func (e *election) lookAtPlaces(ctx context.Context, f finding) {
	if f.reached == nil || e.unplaced == maxUnplaced {
		return
	}
	if e.account == "" {
		call, cancel := context.WithTimeout(ctx, leaderCall)
		m, err := e.conn.RequestWithContext(call, whoSubject, nil)
		cancel()
		if err == nil {
			e.account = parseAccount(m.Data)
		}
	}
	if e.unplaced++; len(e.places(ctx, f)) > 0 {
		e.unplaced = 0
	}
	if e.unplaced == maxUnplaced && ctx.Err() == nil {
		e.account = ""
		e.log.Warn("no nats server tells how far its members are: some elections take two seconds more; let the user of state.elections publish to " + placesSubject)
	}
}

func parseAccount(b []byte) string {
	var says struct {
		Data struct {
			Account string `json:"account"`
		} `json:"data"`
	}
	if len(b) > maxPlace || json.Unmarshal(b, &says) != nil {
		return ""
	}
	return says.Data.Account
}
