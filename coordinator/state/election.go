package state

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A follower of a stream notices after 4 to 9 s that its leader is silent, by constants of nats-server. A coordinator notices at once: what it
// asks the leader finds nobody. It may then say so to the stream's Raft group in a request for votes, on the subject on which members
// send theirs. Such a request names a new term and a log that is empty. Raft has every member take up the new term, grant nothing to a log that is
// behind its own, and hold an election soon, of its own accord and by its own log (100 to 800 ms). So nobody is elected
// who would not be elected anyway, nothing that was acknowledged is lost, and a leader that lives after all is elected again.
//
// The subject belongs to the system account of the cluster, so an operator gives the coordinator a user there that may do this and nothing
// else. Without one, elections are waited for.
const (
	votesSubject = "$NRG.V." // and the group: requests for votes, 3 numbers and a candidate; as of nats-server 2.2 to 2.15
	candidate    = "_culvert"
	peerLength   = 8

	lostSubject = "culvert.lost" // what one node misses, all look for

	slowCall      = 300 * time.Millisecond // a call that takes longer has the leader looked for
	rollCall      = 250 * time.Millisecond // for members to answer
	leaderCall    = 250 * time.Millisecond // for a leader to answer, and for the server that we are connected to
	electionWait  = time.Second            // for a leader, and up to half longer, once an election has been asked for
	askedWait     = 700 * time.Millisecond // and up to twice that, where one is under way already
	slowLeader    = 500 * time.Millisecond // for one whose server answers
	reconnectTime = 100 * time.Millisecond // for a connection to another server
	maxMoves      = 4                      // to other servers, of an alarm
	silence       = 500 * time.Millisecond // of members that a leader has just written to
	electionAgain = 20 * time.Millisecond  // between looks at whether there is one
	rollEvery     = 5 * time.Second        // the term is looked up while all is well
	settling      = 3 * time.Second        // after an election: servers that are slow then need no other one
)

// errNewLeader ends a try that was waiting for an answer of a leader that is no longer one.
var errNewLeader = errors.New("another server leads by now")

// election is what a node does about the loss of a stream's leader.
type election struct {
	conn  *nats.Conn // for leases or log
	votes *nats.Conn // of the user that may ask for elections
	log   *slog.Logger
	info  func(ctx context.Context) (*jetstream.StreamInfo, error) // asks the stream's leader
	lost  func()                                                   // the server that we are connected to is frozen, or cut off from most others

	group   string // Raft's name of the stream's group
	members int
	settled time.Time // when a leader was elected last
	warned  bool      // that nobody answers
	hears   bool      // requests for votes
	term    uint64    // the latest that was heard of while there was a leader
	leading string    // who led last, by peerOf
	stand   standing  // heard on the group's subject, where the user may listen there

	alarms chan bool // true: nobody leads; false: a call takes long

	mu      sync.Mutex
	waiting map[*context.CancelCauseFunc]struct{} // tries under way
	told    time.Time                             // when all nodes were told last
}

// newElection connects as the user that may ask for elections; nil where there is none.
func newElection(opts Options, conn *nats.Conn, stream jetstream.Stream, lost func()) (*election, error) {
	if opts.Elections == "" {
		return nil, nil
	}
	votes, err := connect(Options{NATS: opts.NATS, Credentials: opts.Elections, Logger: opts.Logger}, nil, make(chan struct{}, 1))
	if err != nil {
		return nil, fmt.Errorf("connect to ask for elections: %w", err)
	}
	return &election{
		conn: conn, votes: votes, log: opts.Logger, lost: lost, alarms: make(chan bool, 1), waiting: map[*context.CancelCauseFunc]struct{}{},
		info: func(ctx context.Context) (*jetstream.StreamInfo, error) { return stream.Info(ctx) },
	}, nil
}

// run looks after the stream until ctx ends, and closes the connection for votes.
func (e *election) run(ctx context.Context) {
	defer e.votes.Close()
	heard, err := e.conn.Subscribe(lostSubject, func(*nats.Msg) { e.raise(false) })
	if err == nil {
		defer func() { _ = heard.Unsubscribe() }()
	}
	look := time.NewTicker(rollEvery)
	defer look.Stop()
	e.look(ctx)
	if e.members >= 3 {
		e.lookAtSyncing(ctx)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			e.look(ctx)
		case nobody := <-e.alarms:
			if e.hold(ctx, nobody) {
				e.look(ctx) // those who stood for it have counted on
			}
		}
	}
}

// look learns the group and its term while there is a leader.
func (e *election) look(ctx context.Context) {
	info, led := e.leader(ctx)
	if !led {
		return
	}
	if e.group, e.members = info.RaftGroup, len(info.Replicas)+1; e.members < 3 {
		return
	}
	term, peers := e.roll(ctx, 0, e.members)
	e.term = max(e.term, term)
	e.listen()
	if len(peers) == 0 && !e.warned && ctx.Err() == nil {
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
	_, err := e.votes.Subscribe(votesSubject+e.group, func(m *nats.Msg) { e.stand.heard(m.Data) }) // ends with the connection
	e.hears = err == nil
}

// leader asks whether the stream has a leader that answers, and what it says of the members.
func (e *election) leader(ctx context.Context) (*jetstream.ClusterInfo, bool) {
	ctx, cancel := context.WithTimeout(ctx, leaderCall)
	defer cancel()
	info, err := e.info(ctx)
	if err != nil || info.Cluster == nil || info.Cluster.Leader == "" {
		return nil, false
	}
	e.leading = peerOf(info.Cluster.Leader)
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
func (e *election) hold(ctx context.Context, nobody bool) bool {
	if e.members < 3 || e.group == "" || !nobody && time.Since(e.settled) < settling {
		return false
	}
	began, before := time.Now(), e.term
	for moves := 0; ctx.Err() == nil && moves < maxMoves; {
		enough := e.members
		if nobody {
			enough = e.members/2 + 1
		}
		f := e.inquire(ctx, enough)
		most := 2*f.answered > e.members
		cutOff := f.leads && f.alone && !nobody && f.answered < e.members
		switch {
		case f.leads && !cutOff:
			return e.found(f.term, began, before)
		case f.heard && !nobody && !cutOff && f.lives && e.await(ctx, slowLeader, f.answered):
			return e.found(f.term, began, before)
		case cutOff, !f.lives, !most, f.heard && moves == 0: // we ask through servers that are lost or cut off, maybe with the leader; or most members are away
			moves++
			e.move(ctx, cutOff || !f.lives || f.heard || f.answered > 0, !most)
		case !nobody && (f.heard || f.answered == e.members): // all are there that matter, among them a leader that is slow
			return false
		case e.elect(ctx, f):
			return e.found(e.term, began, before)
		}
	}
	return false
}

// elect asks for an election, where that is for this node to do, and waits for what comes of it. Where it comes to nothing for certain the next one is asked
// for at once, by all nodes in the same term.
func (e *election) elect(ctx context.Context, f finding) bool {
	again, wait := e.ask(f.term)
	for ctx.Err() == nil {
		if again {
			e.send(e.term)
		}
		if e.await(ctx, wait, f.answered) {
			return true
		}
		term, torn := e.stand.torn(e.term, e.members, f.answered)
		if !torn {
			return false
		}
		e.term, again, wait = term+1, true, electionWait+rand.N(electionWait/2)
	}
	return false
}

// ask reports whether an election is to be asked for, in the term that the node takes up: not where the term has moved, for then others have
// asked, or members stand, and a later term would end that. It gives how long a leader is to be waited for, which is not the same for nodes that wait at once.
func (e *election) ask(term uint64) (again bool, wait time.Duration) {
	if term > e.term {
		e.term = term
		return false, askedWait + rand.N(askedWait)
	}
	e.term++
	return true, electionWait + rand.N(electionWait/2)
}

// move leaves the server that is asked for the leader, or the one that is asked for votes, for another one, and waits for that. A connection that is
// being made already is left to it: the next server may be the one that is lost, and then it takes until that is given up.
func (e *election) move(ctx context.Context, asked, votes bool) {
	if asked && e.conn.IsConnected() {
		e.lost()
	}
	if asked {
		e.release()
	}
	if votes && e.votes.IsConnected() {
		_ = e.votes.ForceReconnect() // an error says that it is closed
	}
	e.pause(ctx, electionAgain)
	for deadline := time.Now().Add(reconnectTime); time.Now().Before(deadline) && ctx.Err() == nil && !(e.conn.IsConnected() && e.votes.IsConnected()); {
		e.pause(ctx, electionAgain)
	}
}

// finding is what an inquiry has found.
type finding struct {
	leads    bool // somebody says that he leads
	alone    bool // and has not heard from most members lately
	lives    bool // the server that we are connected to
	term     uint64
	answered int  // members
	heard    bool // among them who led last
}

// inquire asks at once whether the leader leads, the server that we are connected to lives, and which members answer, in which term.
func (e *election) inquire(ctx context.Context, enough int) (f finding) {
	last := e.leading
	var asking sync.WaitGroup
	asking.Go(func() {
		var info *jetstream.ClusterInfo
		if info, f.leads = e.leader(ctx); f.leads {
			f.alone = alone(info, silence)
		}
	})
	asking.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, leaderCall)
		defer cancel()
		f.lives = e.conn.FlushWithContext(ctx) == nil
	})
	term, peers := e.roll(ctx, 0, enough)
	asking.Wait()
	f.term, f.answered, f.heard = term, len(peers), peers[last]
	return f
}

// alone reports whether a leader has heard from most members, itself among them, longer ago than that. One that is cut off takes itself for the leader for
// another 10 to 20 s, and those who ask through it hear nothing else.
func alone(info *jetstream.ClusterInfo, than time.Duration) bool {
	heard := 1
	for _, r := range info.Replicas {
		if r.Active < than {
			heard++
		}
	}
	return 2*heard <= len(info.Replicas)+1
}

// await waits for a leader, until an election that so many members take part in cannot give one.
func (e *election) await(ctx context.Context, wait time.Duration, living int) bool {
	for deadline := time.Now().Add(wait); time.Now().Before(deadline) && ctx.Err() == nil; {
		if _, led := e.leader(ctx); led {
			return true
		}
		if _, torn := e.stand.torn(e.term, e.members, living); torn {
			return false
		}
		e.pause(ctx, electionAgain)
	}
	return false
}

func (e *election) pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// found ends what waits for the former leader's answer, if there was an election; it is asked again.
func (e *election) found(term uint64, began time.Time, before uint64) bool {
	e.term = max(e.term, term)
	if e.term == before {
		return false
	}
	e.settled = time.Now()
	e.log.Warn("a nats server that led a stream was lost, and another one was elected", "group", e.group, "took", time.Since(began))
	e.release()
	select { // what was raised meanwhile is settled
	case <-e.alarms:
	default:
	}
	return true
}

// release ends what waits for an answer that will not come.
func (e *election) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for cancel := range e.waiting {
		(*cancel)(errNewLeader)
	}
	clear(e.waiting)
}

// roll asks all members for their term with a request for votes of the term asked, 0 to change nothing, and gives the latest and which
// members have answered. It is over with the answers of enough of them.
func (e *election) roll(ctx context.Context, asked uint64, enough int) (term uint64, peers map[string]bool) {
	inbox := e.votes.NewInbox()
	answers := make(chan *nats.Msg, 16)
	sub, err := e.votes.ChanSubscribe(inbox, answers)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := e.votes.PublishRequest(votesSubject+e.group, inbox, voteRequest(asked)); err != nil {
		return 0, nil
	}
	peers = map[string]bool{}
	for over := time.After(rollCall); len(peers) < enough; {
		select {
		case m := <-answers:
			if t, peer, ok := parseVote(m.Data); ok {
				term, peers[peer] = max(term, t), true
			} else if m.Header.Get("Status") == "503" { // nobody hears this
				return 0, nil
			}
		case <-over:
			return term, peers
		case <-ctx.Done():
			return term, peers
		}
	}
	return term, peers
}

// send asks for an election.
func (e *election) send(term uint64) {
	_ = e.votes.Publish(votesSubject+e.group, voteRequest(term)) // an error says that the connection is broken: the next alarm asks again
}

// voteRequest asks for votes in a term, for nobody: with a log that is empty.
func voteRequest(term uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, term)
	b = append(b, make([]byte, 16)...) // last term and index
	return append(b, candidate...)
}

// parseVote reads a member's answer: its term and its name.
func parseVote(b []byte) (term uint64, peer string, ok bool) {
	if len(b) != 8+peerLength+1 {
		return 0, "", false
	}
	return binary.LittleEndian.Uint64(b), string(b[8 : 8+peerLength]), true
}

// alarm has the leaders looked for, this stream's and, by all nodes, each: a server that is lost may have led several.
func (e *election) alarm(nobody bool) {
	e.raise(nobody)
	e.mu.Lock()
	tell := time.Since(e.told) > slowCall
	if tell {
		e.told = time.Now()
	}
	e.mu.Unlock()
	if tell {
		_ = e.conn.Publish(lostSubject, nil) // an error says that the connection is broken
	}
}

// raise has this stream's leader looked for.
func (e *election) raise(nobody bool) {
	select {
	case e.alarms <- nobody:
	default: // it is being looked for
	}
}

// during makes a call to a leader: it raises the alarm where that takes long or finds nobody, and ends it with errNewLeader where another
// server leads by now.
func (e *election) during(ctx context.Context, f func(ctx context.Context) error) error {
	if e == nil {
		return f(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	slow := time.AfterFunc(slowCall, func() { e.alarm(false) })
	defer slow.Stop()
	e.mu.Lock()
	e.waiting[&cancel] = struct{}{}
	e.mu.Unlock()
	err := f(ctx)
	e.mu.Lock()
	delete(e.waiting, &cancel)
	e.mu.Unlock()
	switch {
	case err == nil:
	case errors.Is(context.Cause(ctx), errNewLeader):
		return fmt.Errorf("%w: %w", errNewLeader, err)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse):
		e.alarm(true)
	}
	return err
}
