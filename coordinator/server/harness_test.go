package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	publicURL   = "https://culvert.test"
	enrolSecret = "correct horse battery staple"
)

// rig is a coordinator on loopback with an issuer like GitHub's and one for gateways.
type rig struct {
	t      testing.TB
	file   string // culvert.yaml
	doc    string
	issuer *claimstest.Issuer // jobs
	kube   *claimstest.Issuer // gateways
	opts   Options
	server *Server
	client *http.Client
	log    *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newRig(t testing.TB, opts Options) *rig {
	t.Helper()
	return newRigOf(t, opts, func(doc string) string { return doc })
}

// newRigOf starts with an edited configuration, and with more files beside it, given as name and content.
func newRigOf(t testing.TB, opts Options, edit func(doc string) string, files ...string) *rig {
	t.Helper()
	r := &rig{t: t, issuer: claimstest.Start(t), kube: claimstest.Start(t), opts: opts, log: &syncBuffer{}}
	sum := sha256.Sum256([]byte(enrolSecret))
	r.file = filepath.Join(t.TempDir(), "culvert.yaml")
	r.doc = fmt.Sprintf(`
url: %s
listen: "127.0.0.1:0"
udp: "127.0.0.1:0"
state: {dir: state}
issuers: [{url: "%s"}]
networks:
  corp:
    gateways:
      - {issuer: "%s", subject: "system:serviceaccount:culvert:gateway"}
      - {enrol_sha256: %s}
rules:
  - name: deploy
    network: corp
    match: {repository_owner_id: 9919, ref: refs/heads/main}
    allow: ["tcp 10.20.0.5:5432"]
    max_session: 2h
`, publicURL, r.issuer.URL(), r.kube.URL(), hex.EncodeToString(sum[:]))
	r.doc = edit(r.doc)
	r.write(r.doc)
	for i := 0; i < len(files); i += 2 {
		file := filepath.Join(filepath.Dir(r.file), files[i])
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(files[i+1]), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	r.client = &http.Client{Transport: &http.Transport{}, Timeout: 30 * time.Second}
	t.Cleanup(r.client.CloseIdleConnections)
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *rig) write(doc string) {
	r.t.Helper()
	if err := os.WriteFile(r.file, []byte(doc), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) start() {
	r.t.Helper()
	cfg, err := config.Load(r.file)
	if err != nil {
		r.t.Fatal(err)
	}
	opts := r.opts
	opts.Config = cfg
	opts.Logger = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := New(opts)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := s.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.server = s
}

func (r *rig) stop() {
	if r.server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.server.Close(ctx); err != nil {
		r.t.Errorf("close: %v", err)
	}
	r.server = nil
}

func (r *rig) url() string { return "http://" + r.server.Addr().String() }

// hello is how a gateway of this name introduces itself.
func hello(name string) wire.Hello {
	key := wire.Key(sha256.Sum256([]byte(name)))
	return wire.Hello{Version: wire.Version, Instance: strings.Repeat(name, 20)[:20], Name: name, Key: key, Program: "test",
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.9:51820")}}}
}

func (r *rig) dial(edit ...func(o *apitest.Options)) (*apitest.Gateway, error) {
	o := apitest.Options{URL: r.url(), Client: &http.Client{Transport: r.client.Transport}, Network: "corp", Credential: "Enrol " + enrolSecret, Hello: hello("east")}
	for _, f := range edit {
		f(&o)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	return apitest.Dial(ctx, o)
}

// gateway opens a stream and waits until joins see it.
func (r *rig) gateway(edit ...func(o *apitest.Options)) *apitest.Gateway {
	r.t.Helper()
	before := len(r.server.store.Gateways("corp"))
	g, err := r.dial(edit...)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(g.Cut)
	r.eventually("the gateway is live", func() bool { return len(r.server.store.Gateways("corp")) > before })
	return g
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("it never came to be that %s; log:\n%s", what, r.log)
		}
	}
}

// job is a client.
type job struct {
	r      *rig
	key    wire.Key
	claims map[string]any
}

func (r *rig) job() *job {
	private, err := wire.NewPrivateKey()
	if err != nil {
		r.t.Fatal(err)
	}
	return &job{r, private.Public(), map[string]any{
		"repository_owner_id": "9919", "repository": "acme/shop", "ref": "refs/heads/main", "run_id": "1001",
	}}
}

func (j *job) token() wire.Secret {
	return wire.Secret(j.r.issuer.Sign(wire.Audience(publicURL, j.key), j.claims))
}

func (j *job) request() wire.JoinRequest {
	return wire.JoinRequest{Key: j.key, Token: j.token(), Client: "test"}
}

// call does one request; a problem document is the error. The body is read into out where out is not nil.
func (r *rig) call(method, path, bearer string, in, out any) error {
	raw, err := json.Marshal(in)
	if err != nil {
		return err
	}
	resp, err := r.do(method, path, bearer, "", bytes.NewReader(raw))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return problem.Read(resp)
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

func (r *rig) do(method, path, bearer, accept string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url()+path, body)
	if err != nil {
		return nil, err
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	return r.client.Do(req)
}

func (j *job) join() (s wire.Session, err error) {
	err = j.r.call(http.MethodPost, wire.PathSessions, "", j.request(), &s)
	return s, err
}

func (j *job) mustJoin() wire.Session {
	j.r.t.Helper()
	s, err := j.join()
	if err != nil {
		j.r.t.Fatalf("join: %v; log:\n%s", err, j.r.log)
	}
	return s
}

// stream begins a streamed join.
func (j *job) stream() (*http.Response, *bufio.Scanner, error) {
	raw, err := json.Marshal(j.request())
	if err != nil {
		return nil, nil, err
	}
	resp, err := j.r.do(http.MethodPost, wire.PathSessions, "", wire.MediaEvents+", application/json;q=0.5", bytes.NewReader(raw))
	if err != nil {
		return nil, nil, err
	}
	return resp, bufio.NewScanner(resp.Body), nil
}

func nextEvent(t testing.TB, lines *bufio.Scanner) (e wire.JoinEvent) {
	t.Helper()
	if !lines.Scan() {
		t.Fatalf("the stream ended: %v", lines.Err())
	}
	if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
		t.Fatalf("%s: %v", lines.Bytes(), err)
	}
	return e
}

func wantCode(t testing.TB, err error, want problem.Code) {
	t.Helper()
	if got := problem.CodeOf(err); got != want {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
}

// quick are timings with which tests need not wait.
var quick = api.Options{BodyTimeout: 300 * time.Millisecond, HelloTimeout: 300 * time.Millisecond}
