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
  "$SYS": {users: [{nkey: %s, permissions: {publish: ["$NRG.V.>", "$SYS.REQ.SERVER.PING.JSZ"], subscribe: ["_INBOX.>", "$NRG.V.>"]}}]}
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
	e := must(newElection(Options{NATS: []string{servers[1].ClientURL()}, Elections: seed, Logger: quiet}, s.conn, s.bucket.stream, func() {}))
	defer e.votes.Close()
	eventually(t, "all members tell their term", func() bool {
		e.look(t.Context())
		_, peers := e.roll(t.Context(), 0, max(1, e.members))
		return e.term > 0 && len(peers) == 3 && peers[e.leading]
	})
	eventually(t, "an alarm finds the leader, and leaves it alone", func() bool {
		return e.inquire(t.Context(), e.members).leads && !e.hold(t.Context(), false)
	})
	before := e.term
	e.send(before + 1)
	e.send(before + 1) // as another node, which has seen the same
	eventually(t, "there is a leader of a later term", func() bool {
		term, _ := e.roll(t.Context(), 0, e.members)
		_, led := e.leader(t.Context())
		_, torn := e.stand.torn(before+1, e.members, e.members)
		return term > before && led && !torn && e.stand.standing()
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
		e := &election{alarms: make(chan bool, 1), waiting: map[*context.CancelCauseFunc]struct{}{}}
		ended := make(chan error)
		go func() {
			ended <- e.during(t.Context(), func(ctx context.Context) error {
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		began := time.Now()
		if nobody := <-e.alarms; nobody || time.Since(began) != slowCall {
			t.Errorf("nobody %t, after %s", nobody, time.Since(began))
		}
		e.release()
		if err := <-ended; !errors.Is(err, errNewLeader) || !leaderless(err) {
			t.Errorf("ended with %v", err)
		}
		for _, gone := range []error{nats.ErrNoResponders, jetstream.ErrNoStreamResponse} {
			if err := e.during(t.Context(), func(context.Context) error { return gone }); !errors.Is(err, gone) || !<-e.alarms {
				t.Errorf("%v", err)
			}
		}
		if err := e.during(t.Context(), func(context.Context) error { return nil }); err != nil || len(e.waiting)+len(e.alarms) > 0 {
			t.Errorf("%v, %d wait, %d alarms", err, len(e.waiting), len(e.alarms))
		}
	})
}

// TestVoteRequest holds the bytes of a request, and takes answers apart.
func TestVoteRequest(t *testing.T) {
	want := "\x05\x01\x00\x00\x00\x00\x00\x00" + strings.Repeat("\x00", 16) + "_culvert"
	if got := string(voteRequest(0x105)); got != want {
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
		if got := alone(info, silence); got != c.want {
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

// TestAskOnce: who sees that the term has moved asks for none, and who saw it stand still asks for the next one.
func TestAskOnce(t *testing.T) {
	e := &election{term: 7}
	if again, wait := e.ask(9); again || e.term != 9 || wait < askedWait || wait > 2*askedWait {
		t.Errorf("a term that has moved: %t, %d, %s", again, e.term, wait)
	}
	if again, wait := e.ask(8); !again || e.term != 10 || wait < electionWait {
		t.Errorf("one that stands still: %t, %d, %s", again, e.term, wait)
	}
}
