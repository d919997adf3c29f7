package server

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestRestartKeepsSessions: a coordinator that comes back on the same state goes on with its sessions.
func TestRestartKeepsSessions(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	j := r.job()
	s := j.mustJoin()
	r.stop()
	r.start()
	h := hello("east")
	h.Sessions = []wire.Held{{Session: s.ID, Key: j.key, Addresses: s.Addresses, Expires: s.Expires, Ends: s.Ends}}
	g := r.gateway(func(o *apitest.Options) { o.Hello = h })
	if len(g.Welcome.End) != 0 {
		t.Fatalf("the session is over: %v", g.Welcome.End)
	}
	if err := r.call(http.MethodPatch, wire.PathSessions+"/"+s.ID, s.Secret.Reveal(), wire.Update{Token: j.token()}, nil); err != nil {
		t.Fatal(err)
	}
}

// TestLostStateIsReasserted: even without its state, a coordinator takes up what the gateways hold.
func TestLostStateIsReasserted(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	j := r.job()
	s := j.mustJoin()
	dir := r.server.config.State.Dir
	r.stop()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	r.start()
	h := hello("east")
	h.Sessions = []wire.Held{{Session: s.ID, Key: j.key, Addresses: s.Addresses, Expires: s.Expires, Ends: s.Ends}}
	g := r.gateway(func(o *apitest.Options) { o.Hello = h })
	if len(g.Welcome.End) != 0 {
		t.Fatalf("the session is over: %v", g.Welcome.End)
	}
	if other := r.job().mustJoin(); other.Addresses[0] == s.Addresses[0] {
		t.Error("its address is given away")
	}
	if err := g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: j.token()}); err != nil {
		t.Fatal(err)
	}
	r.eventually("its claims are known again", func() bool {
		l, err := r.server.store.Lease(t.Context(), s.ID)
		return err == nil && l.Claims["run_id"] == "1001"
	})
}

// TestRulesChangedWhileAway: what the file took away while the coordinator was down is ended at the next start.
func TestRulesChangedWhileAway(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	j := r.job()
	s := j.mustJoin()
	r.stop()
	r.write(strings.Replace(r.doc, "refs/heads/main", "refs/heads/release", 1))
	r.start()
	r.eventually("the session is over", func() bool {
		l, err := r.server.store.Lease(t.Context(), s.ID)
		return err == nil && l.Over != ""
	})
	h := hello("east")
	h.Sessions = []wire.Held{{Session: s.ID, Key: j.key, Addresses: s.Addresses, Expires: s.Expires, Ends: s.Ends}}
	if g := r.gateway(func(o *apitest.Options) { o.Hello = h }); len(g.Welcome.End) != 1 {
		t.Errorf("the gateway is not told: %+v", g.Welcome)
	}
}

func TestReloadEndsWhatShrank(t *testing.T) {
	r := newRig(t, Options{Reload: 10 * time.Millisecond})
	g := r.gateway()
	s := r.job().mustJoin()
	r.eventually("the mirror has it", func() bool { return r.server.sessions.Held(hello("east").Instance) == 1 })

	r.write(r.doc + "frobnicate: true\n")
	r.eventually("the broken file is refused loudly", func() bool { return strings.Contains(r.log.String(), "is refused and the old one stays") })
	r.job().mustJoin()

	r.write(strings.Replace(r.doc, "10.20.0.5:5432", "10.20.0.5:5433", 1))
	r.eventually("the gateway is told of the end", func() bool { return len(g.Frames(wire.FrameEnd)) == 2 })
	wantCode(t, r.call(http.MethodPatch, wire.PathSessions+"/"+s.ID, s.Secret.Reveal(), wire.Update{}, nil), problem.SessionOver)
	r.job().mustJoin()
}

func TestReloadDropsGateways(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	stays, err := r.dial(func(o *apitest.Options) {
		o.Hello, o.Credential = hello("west"), "Bearer "+r.kube.ServiceAccount(publicURL, "culvert", "gateway")
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stays.Cut()
	lines := strings.Split(r.doc, "\n")
	for i, l := range lines {
		if strings.Contains(l, "enrol_sha256") {
			lines[i] = "      - {enrol_sha256: " + strings.Repeat("ab", 32) + "}"
		}
	}
	r.write(strings.Join(lines, "\n"))
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	if websocket.CloseStatus(g.Err()) != websocket.StatusPolicyViolation {
		t.Errorf("got %v", g.Err())
	}
	select {
	case <-stays.Done():
		t.Error("a gateway that is enrolled otherwise was dropped")
	default:
	}
	_, err = r.dial()
	wantCode(t, err, problem.Unauthorized)
}

// TestReloadIssuers: a new issuer's jobs are taken and an old one's are not; what needs a restart is said and left.
func TestReloadIssuers(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	next := newRig(t, Options{}) // for its issuer
	doc := strings.Replace(r.doc, r.issuer.URL(), next.issuer.URL(), 1)
	r.write(strings.Replace(doc, publicURL, "https://moved.test", 1))
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := r.job().join()
	wantCode(t, err, problem.TokenIssuer)
	j := r.job()
	req := j.request()
	req.Token = wire.Secret(next.issuer.Sign(wire.Audience(publicURL, j.key), j.claims))
	if err := r.call(http.MethodPost, wire.PathSessions, "", req, nil); err != nil {
		t.Errorf("the new issuer, with the URL that stays in force: %v", err)
	}
	if !strings.Contains(r.log.String(), "wait for a restart") {
		t.Error("the changed url is not spoken of")
	}
}

// TestTargetsAndGroupsOnRecord: who widens a rule by what it names leaves as much of a trace as who edits it.
func TestTargetsAndGroupsOnRecord(t *testing.T) {
	r := newRigOf(t, Options{}, func(doc string) string {
		return doc + `
  - {name: fresh, network: corp, groups: shop, match: {ref: refs/heads/main}, targets: db}
groups: {shop: [{repository_owner_id: 9919, repository: acme/shop}]}
targets: {db: ["tcp 10.20.0.9:1"]}
`
	})
	for n, change := range [][2]string{{"10.20.0.9:1", "10.20.0.9:*"}, {"acme/shop", "acme/*"}, {"lease", "lease"}} {
		r.doc = strings.Replace(r.doc, change[0], change[1], 1)
		r.write(r.doc)
		if err := r.server.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		same, d := change[0] == change[1], r.records(audit.Policy)
		last := d[len(d)-1]
		if got := slices.Equal(last.Unmapped.Change.Changed, []string{"fresh"}); len(d) != n+2 || got == same || (last.Entity.UID == last.EntityResult.UID) != same {
			t.Errorf("%q: %+v", change, last.Unmapped.Change)
		}
	}
}

// TestReloadTellsWhatWaits: whatever is not as it was at the start waits, at each reload, and nothing does that was put back.
func TestReloadTellsWhatWaits(t *testing.T) {
	r := newRig(t, Options{})
	for _, step := range []struct {
		extra string
		want  int
	}{{"limits: {owner: 7}\n", 1}, {"limits: {owner: 7}\nlease: 5m\n", 2}, {"", 2}} {
		r.write(r.doc + step.extra)
		if err := r.server.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(r.log.String(), "wait for a restart"); got != step.want {
			t.Errorf("with %q it was told %d times by then, want %d", step.extra, got, step.want)
		}
	}
}

func TestIssuerAway(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	r.job().mustJoin() // its keys are cached now
	r.issuer.SetAway(true)
	r.job().mustJoin()
	r.stop()
	r.start() // nothing is cached any more
	_, err := r.job().join()
	wantCode(t, err, problem.IssuerAway)
}

// A start that fails says what to do, and puts no end of what never began on record.
func TestStartFails(t *testing.T) {
	r := newRig(t, Options{})
	records := filepath.Join(t.TempDir(), "audit.jsonl")
	for name, doc := range map[string]string{
		"TCP taken":      strings.Replace(strings.Replace(r.doc, "dir: state", "dir: other", 1), `listen: "127.0.0.1:0"`, `listen: "`+r.server.Addr().String()+`"`, 1),
		"UDP taken":      strings.Replace(strings.Replace(r.doc, "dir: state", "dir: other", 1), `udp: "127.0.0.1:0"`, `udp: "`+r.server.STUNAddr().String()+`"`, 1),
		"state in use":   r.doc,
		"no certificate": strings.Replace(r.doc, "dir: state}", "dir: other}\ntls: {cert: none.pem, key: none.pem}", 1),
	} {
		r.write(doc + "audit: {log: " + records + "}\n")
		s, err := New(Options{Config: loadOr(t, r.file)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context()); err == nil {
			t.Errorf("%s: started", name)
		} else if p := problem.From(err); p.Next == "" {
			t.Errorf("%s: no next step in %v", name, err)
		}
		if data, _ := os.ReadFile(records); len(data) > 0 {
			t.Errorf("%s: on record is %s", name, data)
		}
	}
}
