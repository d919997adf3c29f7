package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// entry is a record as tests look at it.
type entry struct {
	audit.Record
	Metadata struct {
		Event audit.Event `json:"event_code"`
	}
}

// records gives the stored records of some events.
func (r *rig) records(events ...audit.Event) (out []entry) {
	r.t.Helper()
	f := audit.Filter{Events: events}
	err := r.server.audit.Reader().Tail(r.t.Context(), f, 0, false, func(line []byte) bool {
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			r.t.Errorf("%s: %v", line, err)
		}
		out = append(out, e)
		return true
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// recorded waits for the records of an event that nobody waits for.
func (r *rig) recorded(event audit.Event, count int) []entry {
	r.t.Helper()
	var out []entry
	r.eventually(string(event)+" is on record", func() bool {
		out = r.records(event)
		return len(out) >= count
	})
	if len(out) != count {
		r.t.Errorf("%d records of %s, want %d", len(out), event, count)
	}
	return out
}

func (r *rig) sound() audit.Report {
	r.t.Helper()
	rep, err := r.server.audit.Reader().Verify(r.t.Context(), audit.Anchor{})
	if err != nil || !rep.OK() {
		r.t.Errorf("the log: %+v, %v", rep.Findings, err)
	}
	return rep
}

// TestEverythingIsOnRecord takes a coordinator through all that it decides, and finds one record of each.
func TestEverythingIsOnRecord(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	j := r.job()
	j.claims["actor"], j.claims["check_run_id"] = "octocat", "5005"
	s := j.mustJoin()

	joins := r.records(audit.Join) // no waiting: the join has been answered
	if len(joins) != 1 {
		t.Fatalf("%d joins", len(joins))
	}
	e := joins[0]
	if e.Action != 1 || e.Session.UID != s.ID || e.Authorizations[0].Policy.Name != "deploy" || e.Unmapped.Gateway != "east" ||
		e.Actor.User.Name != "octocat" || e.Source.IP != "127.0.0.1" || !slices.Equal(e.Unmapped.Addresses, s.Addresses) ||
		e.Unmapped.Grants[0].Allow != "tcp 10.20.0.5:5432" || e.Unmapped.Network != "corp" || e.Unmapped.Key != j.key.String() {
		t.Errorf("join: %+v", e)
	}
	if job := e.Unmapped.Job; job.Repository != "acme/shop" || job.RunID != "1001" || job.CheckRunID != "5005" || job.Ref != "refs/heads/main" || job.OwnerID != "9919" {
		t.Errorf("job: %+v", job)
	}

	denied := r.job()
	denied.claims["ref"] = "refs/heads/evil"
	_, err := denied.join()
	wantCode(t, err, problem.Denied)
	if d := r.records(audit.Denied); len(d) != 1 || d[0].Action != 2 || d[0].Code != "denied" || d[0].Unmapped.Denial.Claim != "ref" || d[0].Unmapped.Job.Ref != "refs/heads/evil" {
		t.Errorf("denials: %+v", d)
	}

	path := wire.PathSessions + "/" + s.ID
	if err := r.call(http.MethodPatch, path, s.Secret.Reveal(), wire.Update{Token: j.token()}, nil); err != nil {
		t.Fatal(err)
	}
	if d := r.records(audit.Renew); len(d) != 1 || d[0].Unmapped.By != "client" || d[0].Session.UID != s.ID || d[0].Unmapped.Job.RunID != "1001" {
		t.Errorf("renewals: %+v", d)
	}
	if err := g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: j.token()}); err != nil {
		t.Fatal(err)
	}
	r.recorded(audit.Renew, 2)
	other := r.job()
	other.claims["run_id"] = "6666"
	other.key = j.key
	wantCode(t, r.call(http.MethodPatch, path, s.Secret.Reveal(), wire.Update{Token: other.token()}, nil), problem.TokenInvalid)
	if d := r.records(audit.RenewDeny); len(d) != 1 || d[0].Code != "token-invalid" || d[0].Session.UID != s.ID {
		t.Errorf("refused renewals: %+v", d)
	}

	if err := r.call(http.MethodDelete, path, s.Secret.Reveal(), nil, nil); err != nil {
		t.Fatal(err)
	}
	if d := r.records(audit.End); len(d) != 1 || d[0].Unmapped.By != "client" || d[0].Session.UID != s.ID || d[0].Session.Reason != "ended by the client" {
		t.Errorf("ends: %+v", d)
	}
	s2 := r.job().mustJoin()
	if err := g.Send(t.Context(), wire.FrameEnd, 0, wire.End{Session: s2.ID, Reason: "lease expired"}); err != nil {
		t.Fatal(err)
	}
	if d := r.recorded(audit.End, 2); d[1].Unmapped.By != "gateway" || d[1].Session.Reason != "lease expired" || d[1].Unmapped.Job.RunID != "1001" {
		t.Errorf("the gateway's end: %+v", d[1])
	}
	if d := r.records(audit.Enrolled); len(d) != 1 || d[0].Unmapped.Gateway != "east" || !strings.HasPrefix(d[0].Unmapped.By, "secret ") || len(d[0].Unmapped.By) != 15 {
		t.Errorf("enrolments: %+v", d)
	}
	g.Close()
	r.recorded(audit.Unenrolled, 1)
	if d := r.records(audit.Started, audit.Policy); len(d) != 2 || d[1].Unmapped.Change.Rules != 1 || d[0].Unmapped.Key == "" {
		t.Errorf("starts: %+v", d)
	}
	r.sound()
}

// TestPolicyShrinksOnRecord: a changed file is on record with what changed, and so is the end of each session that it ended.
func TestPolicyShrinksOnRecord(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	s := r.job().mustJoin()
	r.eventually("the mirror has it", func() bool { return r.server.sessions.Held(hello("east").Instance) == 1 })
	changed := strings.Replace(r.doc, "10.20.0.5:5432", "10.20.0.5:5433", 1) + `
  - {name: fresh, network: corp, match: {repository_owner_id: 9919}, allow: ["tcp 10.20.0.9:1"]}
lease: 5m
`
	r.write(changed)
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	d := r.records(audit.Policy)
	if c := d[len(d)-1].Unmapped.Change; !slices.Equal(c.Changed, []string{"deploy"}) || !slices.Equal(c.Added, []string{"fresh"}) ||
		c.Removed != nil || !slices.Equal(c.Other, []string{"lease"}) || c.SHA256 == d[0].Unmapped.Change.SHA256 || d[1].Entity.UID != d[0].Unmapped.Change.SHA256 {
		t.Errorf("%+v", c)
	}
	if e := r.recorded(audit.End, 1)[0]; e.Session.UID != s.ID || e.Unmapped.By != "coordinator" || !strings.HasPrefix(e.Session.Reason, "policy") {
		t.Errorf("%+v", e)
	}
}

// TestGatewayKeyChange: a gateway of a known name with another key is on record with both, also after a restart.
func TestGatewayKeyChange(t *testing.T) {
	r := newRig(t, Options{})
	for range 2 {
		r.gateway().Close()
		r.eventually("it has left", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	}
	if d := r.records(audit.KeyChange); len(d) != 0 {
		t.Errorf("the same key: %+v", d)
	}
	r.stop()
	r.start()
	h := hello("east")
	h.Key, h.Instance = wire.Key{7}, strings.Repeat("n", 20)
	r.gateway(func(o *apitest.Options) { o.Hello = h })
	if d := r.recorded(audit.KeyChange, 1); d[0].Entity.UID != hello("east").Key.String() || d[0].EntityResult.UID != h.Key.String() || d[0].Unmapped.Gateway != "east" {
		t.Errorf("%+v", d)
	}
}

// TestFlowBatches: what a gateway reports of flows is stored with whose job it was before it is acknowledged, once.
func TestFlowBatches(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	west := r.gateway(func(o *apitest.Options) { o.Hello = hello("west") })
	s, past := r.job().mustJoin(), r.job().mustJoin()
	holder := map[string]*apitest.Gateway{"east": g, "west": west}
	held := r.records(audit.Join)
	mine := holder[held[0].Unmapped.Gateway]
	if err := holder[held[1].Unmapped.Gateway].Send(t.Context(), wire.FrameEnd, 0, wire.End{Session: past.ID, Reason: "lease expired"}); err != nil {
		t.Fatal(err)
	}
	r.recorded(audit.End, 1)
	flow := func(id string, n int) wire.FlowRecord {
		return wire.FlowRecord{Session: id, Proto: "tcp", Name: "db.internal", Addr: netip.MustParseAddrPort("10.20.0.5:5432"),
			Verdict: wire.FlowAllowed, Rule: "deploy", Began: time.Now(), BytesUp: uint64(n), Count: 3}
	}
	batch := wire.Flows{Seq: 1, Records: []wire.FlowRecord{flow(s.ID, 1), flow(wire.Key{9}.SessionID(), 2), flow(s.ID, 3)}}
	if held[0].Unmapped.Gateway == held[1].Unmapped.Gateway {
		batch.Records = append(batch.Records, flow(past.ID, 4))
	}
	for range 2 { // the second time is as after a lost acknowledgement
		if err := mine.Send(t.Context(), wire.FrameFlows, 0, batch); err != nil {
			t.Fatal(err)
		}
	}
	r.eventually("both are acknowledged", func() bool { return len(mine.Frames(wire.FrameFlowsAck)) == 2 })
	var own *entry
	all := r.records(audit.Flows)
	for _, e := range all {
		if e.Session.UID == s.ID {
			own = &e
		} else if e.Session.UID == past.ID && e.Unmapped.Job == nil {
			t.Error("the flows of a session that ended a moment ago name no job")
		} else if e.Session.UID == (wire.Key{9}).SessionID() && e.Unmapped.Job != nil {
			t.Error("the flows of a session that nobody knows name a job")
		}
	}
	if own == nil || len(all) < 2 || len(all) > 3 || own.Count != 6 || own.Unmapped.Job.Repository != "acme/shop" || own.Unmapped.Batch != 1 || len(own.Unmapped.Flows) != 2 {
		t.Fatalf("%d records, %+v", len(all), own)
	}
	another := g
	if mine == g {
		another = west
	}
	if err := another.Send(t.Context(), wire.FrameFlows, 0, wire.Flows{Seq: 1, Records: []wire.FlowRecord{flow(s.ID, 1)}}); err != nil {
		t.Fatal(err)
	}
	r.eventually("it is acknowledged", func() bool { return len(another.Frames(wire.FrameFlowsAck)) == 1 })
	if n := len(r.records(audit.Flows)); n != len(all) {
		t.Error("a gateway was believed about another one's session")
	}
	if err := mine.Send(t.Context(), wire.FrameFlows, 0, wire.Flows{Seq: 2, Records: make([]wire.FlowRecord, wire.MaxFlowRecords+1)}); err != nil {
		t.Fatal(err)
	}
	r.eventually("a batch that is too long is refused", func() bool { return strings.Contains(r.log.String(), "more than 512 flow records") })
}

// TestNoSecretOnRecord: whatever happens, no token, secret or private key gets into the log or its copy.
func TestNoSecretOnRecord(t *testing.T) {
	var stdout syncBuffer
	r := newRig(t, Options{Stdout: &stdout})
	g := r.gateway()
	j := r.job()
	token := j.token()
	req := j.request()
	req.Token = token
	var s wire.Session
	if err := r.call(http.MethodPost, wire.PathSessions, "", req, &s); err != nil {
		t.Fatal(err)
	}
	secrets := []string{token.Reveal(), s.Secret.Reveal(), enrolSecret}
	for _, bad := range []wire.Secret{token[:len(token)-10] + "AAAAAAAAAA", "eyJh.eyJz.x", wire.Secret(r.issuer.Sign("https://other.test", j.claims)), "plain"} {
		k := r.job()
		req := k.request()
		req.Token = bad
		_ = r.call(http.MethodPost, wire.PathSessions, "", req, nil)
		_ = r.call(http.MethodPatch, wire.PathSessions+"/"+s.ID, s.Secret.Reveal(), wire.Update{Token: bad}, nil)
		_ = r.call(http.MethodPatch, wire.PathSessions+"/"+s.ID, bad.Reveal(), wire.Update{Token: token}, nil)
		_, _ = r.dial(func(o *apitest.Options) { o.Credential = "Enrol " + bad.Reveal() + "x" })
		_ = g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: bad})
		if len(bad) > 20 {
			secrets = append(secrets, bad.Reveal())
		}
	}
	fresh := j.token()
	secrets = append(secrets, fresh.Reveal())
	if err := g.Send(t.Context(), wire.FrameRenewed, 0, wire.Renewed{Session: s.ID, Token: fresh}); err != nil {
		t.Fatal(err)
	}
	r.recorded(audit.Renew, 1)
	var all bytes.Buffer
	if err := r.server.audit.Reader().Export(t.Context(), &all, time.Time{}, time.Time{}); err != nil {
		t.Fatal(err)
	}
	r.stop()
	for _, secret := range secrets {
		parts := strings.Split(secret, ".")
		signature := parts[len(parts)-1]
		for name, text := range map[string]string{"the log": all.String(), "its copy": stdout.String(), "the program's log": r.log.String()} {
			if strings.Contains(text, secret) || len(signature) > 40 && strings.Contains(text, signature) {
				t.Errorf("%s holds the secret %.20q…", name, secret)
			}
		}
	}
	if n := strings.Count(stdout.String(), "\n"); n < 5 {
		t.Errorf("%d lines on standard output", n)
	}
}

// socket is a client of the private listener's socket.
func (r *rig) socket() *http.Client {
	name := r.server.config.Socket()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", name)
	}}}
	r.t.Cleanup(c.CloseIdleConnections)
	return c
}

// TestReadingOverTheSocket: tail with filters, following, verifying and exporting, as the command line does it.
func TestReadingOverTheSocket(t *testing.T) {
	r := newRig(t, Options{})
	if info, err := os.Stat(r.server.config.Socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v %v", info, err)
	}
	r.gateway()
	for _, run := range []string{"1", "2", "3"} {
		j := r.job()
		j.claims["run_id"] = run
		j.mustJoin()
	}
	remote := &audit.Remote{Client: r.socket(), URL: "http://coordinator"}
	for query, want := range map[string]int{
		"event=session.join": 3, "event=session.join&last=2": 2, "run=2": 1, "repository=ACME/shop": 3, "repository=acme/": 3, "repository=acme/x": 0,
		"rule=deploy": 3, "rule=other": 0, "verdict=denied": 0, "verdict=allowed&event=session.join": 3, "network=corp&event=session.join": 3,
		"since=1h&event=session.join": 3, "until=1h": 0, "gateway=east&event=session.join": 3, "actor=nobody": 0, "event=session.join&event=gateway.enrol": 4,
	} {
		q, _ := url.ParseQuery(query)
		n := 0
		if err := remote.Records(t.Context(), q, func([]byte) bool { n++; return true }); err != nil || n != want {
			t.Errorf("%s: %d records, want %d (%v)", query, n, want, err)
		}
	}
	for _, bad := range []string{"event=nothing", "since=yesterday", "verdict=maybe", "last=-1", "last=x"} {
		q, _ := url.ParseQuery(bad)
		if err := remote.Records(t.Context(), q, func([]byte) bool { return true }); problem.CodeOf(err) != problem.BadRequest {
			t.Errorf("%s: %v", bad, err)
		}
	}
	rep, err := remote.Verify(t.Context(), audit.Anchor{})
	if err != nil || !rep.OK() || rep.Records < 6 {
		t.Errorf("%+v %v", rep, err)
	}
	if rep, err = remote.Verify(t.Context(), audit.Anchor{Record: 2, Hash: "wrong"}); err != nil || rep.OK() {
		t.Errorf("a record that was another one: %+v %v", rep, err)
	}
	keys, err := remote.PublicKeys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("%v %v", keys, err)
	}
	parsed, err := audit.ParseKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := remote.Export(t.Context(), nil, &b); err != nil {
		t.Fatal(err)
	}
	exported, err := audit.VerifyExport(bytes.NewReader(b.Bytes()), parsed...)
	if err != nil || !exported.OK() {
		t.Errorf("%+v %v", exported, err)
	}
	end, _, err := audit.EndOf(&b)
	if err != nil {
		t.Fatal(err)
	}
	if rep, err = remote.Verify(t.Context(), end); err != nil || !rep.OK() {
		t.Errorf("against its own export: %+v %v", rep, err)
	}
}

func TestFollowing(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	r.job().mustJoin()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://c"+audit.PathRecords+"?follow=true&last=1&event=session.join", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.socket().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for i := range 4 {
		if i > 0 {
			r.job().mustJoin()
		}
		if !lines.Scan() || !strings.Contains(lines.Text(), `"event_code":"session.join"`) {
			t.Fatalf("line %d: %s %v", i, lines.Text(), lines.Err())
		}
	}
}

// TestPrivateListener: over TCP, audit log and profiles take the secret; the public listener has none of it.
func TestPrivateListener(t *testing.T) {
	sum, other := sha256.Sum256([]byte("sesame")), sha256.Sum256([]byte("other"))
	for name, c := range map[string]struct {
		extra string
		want  map[string]int // by secret
	}{
		"with a secret":    {"private: {listen: \"127.0.0.1:0\", secret_sha256: " + hex.EncodeToString(sum[:]) + "}\n", map[string]int{"": 401, "wrong": 401, "sesame": 200}},
		"without a secret": {"private: {listen: \"127.0.0.1:0\"}\n", map[string]int{"": 401, "sesame": 401}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Options{})
			r.stop()
			r.write(r.doc + c.extra)
			r.start()
			base := "http://" + r.server.private.tcp.Addr().String()
			for _, path := range []string{audit.PathRecords, audit.PathExport, audit.PathVerify, audit.PathKey, "/debug/pprof/", "/debug/pprof/cmdline"} {
				for secret, want := range c.want {
					if code, _ := get(t, r.client, base+path, secret); code != want {
						t.Errorf("%s with %q: %d, want %d", path, secret, code, want)
					}
				}
				if code, _ := get(t, r.client, r.url()+path, "sesame"); code != http.StatusNotFound {
					t.Errorf("%s on the public listener: %d", path, code)
				}
				if code, _ := get(t, r.socket(), "http://c"+path, ""); code != http.StatusOK {
					t.Errorf("%s on the socket: %d", path, code)
				}
			}
			for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
				if code, body := get(t, r.client, base+path, ""); code != http.StatusOK {
					t.Errorf("%s: %d %s", path, code, body)
				}
			}
			r.write(strings.Replace(r.doc+c.extra, hex.EncodeToString(sum[:]), hex.EncodeToString(other[:]), 1))
			if err := r.server.Reload(t.Context()); err != nil {
				t.Fatal(err)
			}
			for secret, want := range map[string]int{"sesame": http.StatusUnauthorized, "other": c.want["sesame"]} {
				if code, _ := get(t, r.client, base+audit.PathKey, secret); code != want {
					t.Errorf("after a reload with another secret, with %q: %d, want %d", secret, code, want)
				}
			}
			if _, body := get(t, r.client, base+"/metrics", ""); !strings.Contains(body, `culvert_coordinator_audit_records_total{event="policy.change"} 2`) {
				t.Error("the metrics do not count records")
			}
			if code, _ := get(t, r.client, r.url()+"/metrics", ""); code != http.StatusNotFound {
				t.Errorf("metrics on the public listener: %d", code)
			}
		})
	}
}

func get(t *testing.T, c *http.Client, url, secret string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if secret != "" {
		req.Header.Set("Authorization", "Bearer "+secret)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// TestAuditKeyFile: with a key of its own the log is signed by that, and records signed before stay believed as former.
func TestAuditKeyFile(t *testing.T) {
	r := newRig(t, Options{})
	before := audit.PublicKey(r.server.audit.PublicKey())
	r.stop()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "audit.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	r.write(r.doc + "audit: {key: " + file + ", former_keys: [" + before + "]}\n")
	r.start()
	if got := r.server.audit.PublicKey(); !got.Equal(key.Public()) {
		t.Error("the key is not the file's")
	}
	if rep := r.sound(); rep.First != 1 {
		t.Errorf("%+v", rep)
	}
}

// TestCopyToFile: the copy's file is opened anew when it was moved away.
func TestCopyToFile(t *testing.T) {
	r := newRig(t, Options{})
	r.stop()
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	r.write(r.doc + "audit: {log: " + file + "}\n")
	r.start()
	content := func(name string) string {
		data, _ := os.ReadFile(name)
		return string(data)
	}
	r.eventually("the start is copied", func() bool { return strings.Contains(content(file), "coordinator.start") })
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	r.server.reopenCopy()
	r.stop()
	if !strings.Contains(content(file), "coordinator.stop") || strings.Contains(content(file), "coordinator.start") {
		t.Errorf("the new file holds %s", content(file))
	}
}
