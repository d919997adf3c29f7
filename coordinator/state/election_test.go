package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/culvertnet/culvert/internal/problem"
)

// natsCluster is three servers, and the seed of a user that may ask them for elections.
func natsCluster(t *testing.T) (servers []*server.Server, seed string) {
	t.Helper()
	voter := must(nkeys.CreateUser())
	seed = seedFile(t, voter)
	route := "127.0.0.1:1" // nobody's: the first one meets the others when they call
	for i := range 3 {
		file := filepath.Join(t.TempDir(), "nats.conf")
		doc := fmt.Sprintf(`
server_name: n%d
listen: "127.0.0.1:-1"
jetstream: {store_dir: %q, max_mem: 64MB, max_file: 2GB}
no_auth_user: culvert
accounts: {
  "$SYS": {users: [{nkey: %s, permissions: {publish: ["$NRG.V.>", "$SYS.REQ.SERVER.PING.JSZ", "$SYS.REQ.SERVER.PING.RAFTZ"], subscribe: ["_INBOX.>", "$NRG.V.>"]}}]}
  CULVERT: {jetstream: enabled, users: [{user: culvert, password: culvert}]}
}
cluster: {name: culvert, listen: "127.0.0.1:-1", routes: ["nats://%s"]}
`, i, t.TempDir(), must(voter.PublicKey()), route)
		if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		opts := must(server.ProcessConfigFile(file))
		opts.NoSigs, opts.NoLog = true, true
		srv := must(server.NewServer(opts))
		srv.Start()
		t.Cleanup(func() {
			srv.Shutdown()
			srv.WaitForShutdown()
		})
		if !srv.ReadyForConnections(20 * time.Second) {
			t.Fatal("a nats server does not start")
		}
		servers = append(servers, srv)
		if i == 0 {
			route = srv.ClusterAddr().String()
		}
	}
	return servers, seed
}

// seedFile writes the seed of an nkey to a file.
func seedFile(t *testing.T, key nkeys.KeyPair) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "user.nk")
	if err := os.WriteFile(file, must(key.Seed()), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestReplicasAreMadeUpFor: streams that were made while the cluster had too few servers get their replicas when a coordinator starts later.
func TestReplicasAreMadeUpFor(t *testing.T) {
	servers, _ := natsCluster(t)
	conn := must(nats.Connect(servers[0].ClientURL()))
	defer conn.Close()
	js := must(jetstream.New(conn))
	eventually(t, "the servers know each other", func() bool {
		_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "PROBE", Replicas: 3})
		return err == nil
	})
	for _, config := range []jetstream.StreamConfig{bucketConfig(), logConfig(LogOptions{MaxBytes: 1 << 20})} {
		eventually(t, "the stream is there, on one server", func() bool {
			_, err := js.CreateStream(t.Context(), config)
			return err == nil
		})
	}
	open(t, Options{NATS: []string{servers[1].ClientURL()}})
	openLog(t, LogOptions{Options: Options{NATS: []string{servers[2].ClientURL()}}, MaxBytes: 1 << 20})
	for _, name := range []string{streamName, logStream, markStream} {
		if n := must(must(js.Stream(t.Context(), name)).Info(t.Context())).Config.Replicas; n != 3 {
			t.Errorf("%s has %d replicas", name, n)
		}
	}
}

// TestElections: the members of a cluster tell their term when they are asked for votes, hold an election in a new one, and are heard when they stand; nothing
// that was acknowledged is lost by that. A leader that answers is left alone, and a user whom the cluster does not know is refused.
func TestElections(t *testing.T) {
	if os.Getenv("CULVERT_E2E_CLUSTER") == "" {
		t.Skip("make cluster runs this, where nothing else keeps three servers from answering in time")
	}
	servers, seed := natsCluster(t)
	s := open(t, Options{NATS: []string{servers[0].ClientURL()}, Elections: seed})
	for i := range 20 {
		must(s.CreateLease(t.Context(), testLease(fmt.Sprint("s", i), time.Now()), testPool))
	}
	urls := []string{servers[0].ClientURL(), servers[1].ClientURL(), servers[2].ClientURL()}
	p := must(newPanel(Options{NATS: urls, Elections: seed, Logger: quiet}))
	defer p.close()
	e := newElection(p, quiet, s.conn, s.bucket.stream, func() {})
	eventually(t, "all members tell their term, through each server", func() bool {
		e.look(t.Context())
		f := e.inquire(t.Context())
		return e.known > 0 && f.term == e.known && len(f.reached) == 3 && f.reached[f.last] && f.leads
	})
	eventually(t, "all members tell how far they are", func() bool {
		e.look(t.Context())
		p := e.places(t.Context(), finding{reached: e.members})
		return len(p) == 3 && p[e.leading].State == "LEADER" && p[e.leading].Index > 0 && sitsOut(p) == place{} && !waits(p, 3)
	})
	for _, why := range []alarm{callSlow, callNobody, serverLost} {
		if e.hold(t.Context(), why) {
			t.Errorf("alarm %d ended a leader", why)
		}
	}
	before := e.known
	p.publish(votesSubject+e.group, voteRequest(before+1, place{}), all) // by three ways, as several nodes that have seen the same
	eventually(t, "there is a leader of a later term", func() bool {
		f := e.inquire(t.Context())
		_, torn := e.stand.torn(3, e.members)
		_, stood := e.stand.somebody()
		return f.term > before && f.leads && !torn && stood
	})
	if answered, lax := e.servers(t.Context(), 3); answered != 3 || len(lax) != 3 {
		t.Errorf("%d servers say how they sync, and %s do it now and then", answered, lax)
	}
	must(s.CreateLease(t.Context(), testLease("after", time.Now()), testPool))
	for i := range 20 {
		must(s.Lease(t.Context(), fmt.Sprint("s", i)))
	}
	for _, file := range []string{seedFile(t, must(nkeys.CreateUser())), filepath.Join(t.TempDir(), "none")} {
		_, err := Open(t.Context(), Options{NATS: []string{servers[0].ClientURL()}, Elections: file, Logger: quiet})
		if p, ok := errors.AsType[*problem.Error](err); !ok || p.Code != problem.BadConfig {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// TestCallsEndWithTheirLeader: what waits for a leader raises the alarm after a while, and is given up once there is another one.
func TestCallsEndWithTheirLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &election{alarms: make(chan alarm, 1)}
		e.calls.told = time.Now().Add(time.Hour) // there are no other nodes
		ended := make(chan error)
		go func() {
			ended <- e.during(t.Context(), func(ctx context.Context) error {
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		began := time.Now()
		for i := range 3 { // each time that it has taken so long again
			if why := <-e.alarms; why != callSlow || time.Since(began) != time.Duration(i+1)*slowCall {
				t.Errorf("alarm %d, after %s", why, time.Since(began))
			}
		}
		e.calls.release()
		if err := <-ended; !errors.Is(err, errNewLeader) || !leaderless(err) {
			t.Errorf("ended with %v", err)
		}
		for _, gone := range []error{nats.ErrNoResponders, jetstream.ErrNoStreamResponse} {
			if err := e.during(t.Context(), func(context.Context) error { return gone }); !errors.Is(err, gone) || <-e.alarms != callNobody {
				t.Errorf("%v", err)
			}
		}
		if err := e.during(t.Context(), func(context.Context) error { return nil }); err != nil || len(e.calls.underWay)+len(e.alarms) > 0 {
			t.Errorf("%v, %d wait, %d alarms", err, len(e.calls.underWay), len(e.alarms))
		}
		time.Sleep(2 * slowCall)
		if len(e.alarms) > 0 {
			t.Error("a call that is over raises the alarm")
		}
	})
}

// TestCallsWaitForALeader: a call that begins while a leader is elected is made once there is one, at once, and not before.
func TestCallsWaitForALeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &election{alarms: make(chan alarm, 1)}
		open, made := e.calls.shut(), make(chan time.Time)
		began := time.Now()
		go func() {
			err := tries(t.Context(), callPatience, func(ctx context.Context) error {
				return e.during(ctx, func(context.Context) error { return nil })
			})
			if err != nil {
				t.Error(err)
			}
			made <- time.Now()
		}()
		time.Sleep(773 * time.Millisecond)
		select {
		case <-made:
			t.Fatal("made in vain")
		default:
		}
		open()
		if at := <-made; at.Sub(began) != 773*time.Millisecond {
			t.Errorf("made after %s", at.Sub(began))
		}
		defer e.calls.shut()()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := e.during(ctx, nil); !errors.Is(err, context.DeadlineExceeded) || !leaderless(err) {
			t.Errorf("a caller without time: %v", err)
		}
	})
}

// TestVoteRequest holds the bytes of a request, and takes answers apart.
func TestVoteRequest(t *testing.T) {
	want := "\x05\x01\x00\x00\x00\x00\x00\x00" + strings.Repeat("\x00", 16) + "_culvert"
	if got := string(voteRequest(0x105, place{})); got != want {
		t.Errorf("%q", got)
	}
	if term, peer, ok := parseVote([]byte("\x07\x00\x00\x00\x00\x00\x00\x00fjFyEjc1\x02")); term != 7 || peer != "fjFyEjc1" || !ok {
		t.Error(term, peer, ok)
	}
	for _, b := range []string{"", "fjFyEjc1", strings.Repeat("x", 18)} {
		if _, _, ok := parseVote([]byte(b)); ok {
			t.Errorf("%q is taken", b)
		}
	}
}

// TestAlone: a leader counts while most members, itself among them, have been heard.
func TestAlone(t *testing.T) {
	for _, c := range []struct {
		active []time.Duration
		want   bool
	}{
		{nil, false},
		{[]time.Duration{time.Millisecond, time.Millisecond}, false},
		{[]time.Duration{time.Millisecond, time.Hour}, false},
		{[]time.Duration{time.Second, time.Hour}, true},
		{[]time.Duration{0, time.Second, time.Second, time.Second}, true},
		{[]time.Duration{0, 0, time.Second, time.Second}, false},
	} {
		info := &jetstream.ClusterInfo{Leader: "n1"}
		for _, a := range c.active {
			info.Replicas = append(info.Replicas, &jetstream.PeerInfo{Active: a})
		}
		if got := alone(info, 500*time.Millisecond); got != c.want {
			t.Errorf("%v: %t", c.active, got)
		}
	}
}

// TestPeerOf: as nats-server names its members.
func TestPeerOf(t *testing.T) {
	for server, want := range map[string]string{"n1": "fjFyEjc1", "n2": "44jzkV9D", "n3": "BXScrY9i"} {
		if got := peerOf(server); got != want {
			t.Errorf("%s is %s", server, got)
		}
	}
}

// TestVerdict: a leader is lost that most members do not reach, and that is known to be dead or cut off; one that answers nobody has more time.
func TestVerdict(t *testing.T) {
	set := func(peers string) map[string]bool {
		out := map[string]bool{}
		for _, p := range strings.Fields(peers) {
			out[p] = true
		}
		return out
	}
	for name, c := range map[string]struct {
		reached, direct, dead string
		leads, none           bool
		why                   alarm
		want                  verdict
	}{
		"all is well":                      {reached: "a b c", direct: "a b c", leads: true, want: led},
		"another one leads by now":         {reached: "b c", direct: "b c", dead: "a", leads: true, why: serverLost, want: led},
		"its server is dead":               {reached: "b c", direct: "b c", dead: "a", why: serverLost, want: lost},
		"it is cut off from the others":    {reached: "b c", direct: "a b c", want: lost},
		"it is cut off from here":          {reached: "a b c", direct: "b c", dead: "a", why: serverLost, want: busy},
		"it is slow":                       {reached: "b c", direct: "b c", want: late},
		"it is slow to say that it leads":  {reached: "a b c", direct: "a b c", want: busy},
		"it has given up":                  {reached: "a b c", direct: "a b c", none: true, want: lost},
		"nobody hears of its stream":       {reached: "a b c", direct: "a b c", why: callNobody, want: lost},
		"another server is dead":           {reached: "a c", direct: "a c", dead: "b", why: serverLost, want: busy},
		"most are dead":                    {direct: "c", dead: "a b", why: serverLost, want: away},
		"we are cut off":                   {dead: "a b c", why: serverLost, want: away},
		"nobody answers":                   {want: away},
		"one of three is there, and leads": {reached: "a", direct: "a", leads: true, want: away},
	} {
		f := finding{last: "a", reached: set(c.reached), direct: set(c.direct), dead: set(c.dead), leads: c.leads, none: c.none}
		if len(f.reached) < 2 {
			f.reached = nil
		}
		if got := f.verdict(3, c.why); got != c.want {
			t.Errorf("%s: %d", name, got)
		}
	}
}
