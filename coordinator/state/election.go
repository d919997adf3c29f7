package state

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A follower of a stream notices after 4 to 9 s that its leader is silent, by constants of nats-server. A coordinator notices at once: its
// panel says that a server is lost, or what it asks the leader finds nobody or takes long. It may then say so to the stream's Raft group in a request for
// votes, on the subject on which members send theirs. Such a request names a new term and a log that is empty. Raft has every member take up the new term,
// grant nothing to a log that is behind its own, and hold an election soon, of its own accord and by its own log (100 to 800 ms). So nobody is elected
// who would not be elected anyway, nothing that was acknowledged is lost, and a leader that lives after all is elected again.
//
// The subject belongs to the system account of the cluster, so an operator gives the coordinator a user there that may do this and nothing
// else. Without one, elections are waited for.
const (
	slowCall      = 150 * time.Millisecond  // a call that takes longer has the leader looked for
	rollCall      = 250 * time.Millisecond  // for members to answer, and a leader
	quickRoll     = 100 * time.Millisecond  // where the last leader's server is lost: for the others
	slowLeader    = 1500 * time.Millisecond // for one that answers nobody, though its server lives: where its disk is slow, those of an election are as well
	electionWait  = 1050 * time.Millisecond // for a leader, once members have a new term: they stand for 100 to 800 ms, and write that to their disks
	leaderCall    = 250 * time.Millisecond  // for a leader to say that it is one
	electionAgain = 20 * time.Millisecond   // between looks at whether there is one
	awayAgain     = 50 * time.Millisecond   // between looks at whether most members are back
	holdLong      = 5 * time.Second         // an alarm: who waits still raises another one
	rollEvery     = 5 * time.Second         // the term is looked up while all is well
	maxElections  = 6                       // that are asked for, one after the other: where that is in vain, disks are so slow that members need
	selfElect     = 10 * time.Second        // the time that they take between elections of their own
	settling      = 3 * time.Second         // after an election: calls that are slow then need no other one, unless the leader is cut off
)

// alarm is why the leader is looked for.
type alarm int

const (
	callSlow   alarm = iota // a call takes long
	callNobody              // a call has found nobody
	serverLost              // a server is lost
)

// election is what a node does about the loss of a stream's leader.
type election struct {
	conn  *nats.Conn // for leases or log
	panel *panel
	log   *slog.Logger
	info  func(ctx context.Context) (*jetstream.StreamInfo, error) // asks the stream's leader
	leave func()                                                   // has conn go to another server

	group    string // Raft's name of the stream's group
	account  string // that the stream lies in; "" where that cannot be learned
	members  map[string]bool
	settled  time.Time // when a leader was elected last
	known    uint64    // the term that it was elected in, or an earlier one
	warned   bool      // that nobody answers
	unplaced int       // times that members did not say how far they are
	hears    bool      // requests for votes
	leading  string    // who led last, by peerOf
	stand    standing  // heard on the group's subject, where the user may listen there
	held     time.Time // when an alarm was over last
	tired    time.Time // when asking for one election after the other was given up

	alarms chan alarm
	calls  calls
}

// newElection is nil where there is no panel.
func newElection(p *panel, log *slog.Logger, conn *nats.Conn, stream jetstream.Stream, leave func()) *election {
	if p == nil {
		return nil
	}
	return &election{
		conn: conn, panel: p, log: log, leave: leave, alarms: make(chan alarm, 1),
		info:  func(ctx context.Context) (*jetstream.StreamInfo, error) { return stream.Info(ctx) },
		stand: standing{news: make(chan struct{}, 1)},
	}
}

// run looks after the stream until ctx ends.
func (e *election) run(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	asking.Go(func() { e.panel.run(ctx) })
	if heard, err := e.conn.Subscribe(lostSubject, func(*nats.Msg) { e.raise(callSlow) }); err == nil {
		defer func() { _ = heard.Unsubscribe() }()
	}
	look := time.NewTicker(rollEvery)
	defer look.Stop()
	e.look(ctx)
	if len(e.members) >= 3 {
		e.lookAtSyncing(ctx)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			e.look(ctx)
		case <-e.panel.lost:
			e.hold(ctx, serverLost)
		case why := <-e.alarms:
			if why == callSlow {
				pause(ctx, time.Until(e.held.Add(slowCall))) // where all is slow, it is not asked all the time
			}
			e.hold(ctx, why)
		}
	}
}

// look learns the group, its members and its term while there is a leader.
func (e *election) look(ctx context.Context) {
	call, cancel := context.WithTimeout(ctx, leaderCall)
	defer cancel()
	info, led := e.leader(call)
	if !led {
		return
	}
	e.group, e.members = info.RaftGroup, map[string]bool{peerOf(info.Leader): true}
	for _, r := range info.Replicas {
		e.members[peerOf(r.Name)] = true
	}
	if len(e.members) < 3 {
		return
	}
	e.listen()
	f := e.inquire(ctx)
	e.lookAtPlaces(ctx, f)
	if f.leads {
		e.known = max(e.known, f.term)
		e.stand.over(f.term)
	}
	if f.reached == nil && !e.warned && ctx.Err() == nil {
		e.warned = true
		e.log.Warn("no nats server answers a request for votes: if one dies that leads, joins wait up to 9 s", "subject", votesSubject+e.group)
	}
}

// listen hears who stands for leader from now on. A user that may not is told so by the server, which is logged; elections that come to nothing are then
// waited for.
func (e *election) listen() {
	if e.hears {
		return
	}
	e.hears = true
	for _, s := range e.panel.seats {
		_, err := s.conn.Subscribe(votesSubject+e.group, func(m *nats.Msg) { e.stand.heard(m.Data) }) // ends with the connection
		e.hears = e.hears && err == nil
	}
}

// leader asks whether the stream has a leader that answers, and what it says of the members.
func (e *election) leader(ctx context.Context) (*jetstream.ClusterInfo, bool) {
	info, err := e.info(ctx)
	if err != nil || info.Cluster == nil || info.Cluster.Leader == "" {
		return nil, false
	}
	return info.Cluster, true
}

// peerOf is the name by which a server takes part in Raft, as of nats-server 2.2 to 2.15. If another version names it otherwise, no member is taken
// for the leader.
func peerOf(server string) string {
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	sum := sha256.Sum256([]byte(server))
	name := sum[:peerLength]
	for i, b := range name {
		name[i] = digits[int(b)%len(digits)]
	}
	return string(name)
}

// hold does what an alarm asks for: it has the members elect a leader, unless there is one. It reports whether one was elected.
func (e *election) hold(ctx context.Context, why alarm) bool {
	if len(e.members) < 3 {
		return false
	}
	began := time.Now()
	calm := why == callSlow && time.Since(e.settled) < settling
	defer func() { e.held = time.Now() }()
	for ctx.Err() == nil && time.Since(began) < holdLong {
		f := e.inquire(ctx)
		e.move(f)
		v := f.verdict(len(e.members), why)
		if v == late && time.Since(began) > slowLeader {
			v = lost
		}
		if calm && !f.cutOff(f.last) && v != led {
			return false
		}
		switch v {
		case led:
			return e.found(f.term, began)
		case busy:
			return false
		case away:
			pause(ctx, awayAgain)
		case lost:
			if e.elect(ctx, f) {
				return e.found(e.stand.latest(), began)
			}
			pause(ctx, electionAgain)
		}
	}
	return false
}

// elect has the members hold an election, unless one is under way, and waits for what comes of it. Where it comes to nothing for certain, or is won by
// somebody who will not lead before long, the next one is asked for at once, by all nodes in the same term. Whoever is cut off from most members is left
// alone: it would stand again and again until it is back, and then end the term of who leads by then.
func (e *election) elect(ctx context.Context, f finding) bool {
	defer e.calls.shut()()
	e.stand.saw(f.term)
	if e.stand.comingTo() == 0 && time.Since(e.tired) > selfElect {
		e.ask(ctx, f, e.stand.latest())
	}
	for range maxElections {
		led, over := e.await(ctx, f)
		if led || over == 0 {
			return led
		}
		e.ask(ctx, f, over)
	}
	e.tired = time.Now()
	return false
}

// ask asks for an election in the term after last, unless another node has meanwhile. Members that are behind are asked for their votes: see [sitsOut].
func (e *election) ask(ctx context.Context, f finding, last uint64) {
	behind := sitsOut(e.places(ctx, f))
	if e.stand.next(last) {
		e.panel.publish(votesSubject+e.group, voteRequest(last+1, behind), f.cutOff)
	}
}

// await waits for a leader of those that most members reach, until the election that is under way has come to nothing: over is its term, where that is
// certain.
func (e *election) await(ctx context.Context, f finding) (led bool, over uint64) {
	ctx, cancel := context.WithCancel(ctx)
	leaders, won := make(chan string), make(chan uint64, 1)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() { e.askOn(ctx, leaders) })
	asking.Go(func() { e.lookOut(ctx, f, won) })
	for {
		if term, torn := e.stand.torn(len(e.members), f.reached); torn {
			return false, term
		}
		left := e.stand.comingTo()
		if left == 0 {
			return false, 0
		}
		select {
		case leader := <-leaders:
			if f.reached[leader] {
				e.leading = leader
				return true, 0
			}
		case term := <-won:
			return false, term
		case <-e.stand.news: // somebody stands, which may give him more time, or nobody any
		case <-time.After(left):
		case <-ctx.Done():
			return false, 0
		}
	}
}

// askOn asks for the leader again and again until ctx ends.
func (e *election) askOn(ctx context.Context, leaders chan<- string) {
	for ; ctx.Err() == nil; pause(ctx, electionAgain) {
		call, cancel := context.WithTimeout(ctx, leaderCall)
		info, led := e.leader(call)
		cancel()
		if led {
			select {
			case leaders <- peerOf(info.Leader):
			case <-ctx.Done():
			}
		}
	}
}

// move leaves the server that is asked for leases or log for another one where it is lost, or cut off from most members.
func (e *election) move(f finding) {
	if !e.conn.IsConnected() {
		return // it is being made already
	}
	if f.cutOff(peerOf(e.conn.ConnectedServerName())) {
		e.leave()
	}
}

// found ends what waits for the former leader's answer, if there was an election; it is asked again.
func (e *election) found(term uint64, began time.Time) bool {
	e.stand.over(term)
	if term <= e.known {
		return false
	}
	e.known, e.settled = term, time.Now()
	e.log.Warn("a nats server that led a stream was lost, and another one was elected", "group", e.group, "took", time.Since(began))
	e.calls.release()
	for range cap(e.alarms) { // what was raised meanwhile is settled
		select {
		case <-e.alarms:
		default:
		}
	}
	return true
}

// raise has this stream's leader looked for.
func (e *election) raise(why alarm) {
	select {
	case e.alarms <- why:
	default: // it is being looked for
	}
}
