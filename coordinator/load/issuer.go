package load

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// lifetime is how long a token lasts, as at GitHub.
const lifetime = 5 * time.Minute

// issuer signs the jobs' tokens, in the shape of GitHub's. Its key lives as long as the process.
type issuer struct {
	opts   Options
	key    *rsa.PrivateKey
	keyID  string
	header string // of every token, encoded
	runs   atomic.Uint64

	fetches atomic.Int64 // of the key set
}

func newIssuer(opts Options) (*issuer, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("make an RSA key: %w", err)
	}
	sum := sha256.Sum256(key.N.Bytes())
	i := &issuer{opts: opts, key: key, keyID: hex.EncodeToString(sum[:20])}
	head, err := json.Marshal(map[string]string{"alg": "RS256", "kid": i.keyID, "typ": "JWT"})
	if err != nil {
		return nil, err
	}
	i.header = base64.RawURLEncoding.EncodeToString(head)
	return i, nil
}

// keySet is what the issuer publishes.
func (i *issuer) keySet() jose.JSONWebKeySet {
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: i.keyID, Algorithm: "RS256", Use: "sig"}}}
}

// publish writes the key set to a file, or serves it until stop is called.
func (i *issuer) publish(ctx context.Context) (stop func(), err error) {
	if i.opts.JWKSFile != "" {
		data, err := json.Marshal(i.keySet())
		if err == nil {
			err = replaceFile(i.opts.JWKSFile, data)
		}
		if err != nil {
			return nil, problem.Wrap(err, problem.Failed, "the key set cannot be written: "+err.Error(), "give a path that can be written to")
		}
		return func() {}, nil
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", i.opts.IssuerListen)
	if err != nil {
		return nil, problem.Wrap(err, problem.Failed, fmt.Sprintf("the issuer cannot listen on %s: %v", i.opts.IssuerListen, problem.Reason(err)),
			"give --issuer-listen an address of this machine, or --jwks-file a path that the coordinator reads")
	}
	srv := &http.Server{Handler: i.handler(), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends with ErrServerClosed
	}()
	return func() {
		_ = srv.Close()
		<-done
	}, nil
}

// replaceFile puts a file in place at once, so that nobody reads half of it.
func replaceFile(name string, data []byte) error {
	if err := os.WriteFile(name+".new", data, 0o644); err != nil { //nolint:gosec // public keys
		return err
	}
	return os.Rename(name+".new", name)
}

// handler serves discovery and keys, below the path of the issuer's URL.
func (i *issuer) handler() http.Handler {
	base := strings.TrimRight(i.opts.Issuer, "/")
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v) // the peer went away
		}
	}
	discovery := answer(map[string]any{
		"issuer": i.opts.Issuer, "jwks_uri": base + "/.well-known/jwks", "response_types_supported": []string{"id_token"},
		"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256"},
	})
	keys := answer(i.keySet())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/.well-known/openid-configuration"):
			discovery(w, r)
		case strings.HasSuffix(r.URL.Path, "/.well-known/jwks"):
			i.fetches.Add(1)
			keys(w, r)
		default:
			http.NotFound(w, r)
		}
	})
}

// ticket is what a job needs to join: its key and a token for it.
type ticket struct {
	key   wire.Key
	run   uint64 // the workflow run's id
	token wire.Secret
}

// job makes a new job. No tunnel is built, so its public key is random bytes.
func (i *issuer) job() (ticket, error) {
	t := ticket{run: i.runs.Add(1)}
	rand.Read(t.key[:]) // never fails (crypto/rand)
	return i.tokenFor(t)
}

// tokenFor signs another token for a job, in the size and shape of GitHub's.
func (i *issuer) tokenFor(t ticket) (_ ticket, err error) {
	owner, _, _ := strings.Cut(i.opts.Repository, "/")
	ref := "refs/heads/main"
	workflow := i.opts.Repository + "/.github/workflows/deploy.yml@" + ref
	run := strconv.FormatUint(t.run, 10)
	const sha = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
	t.token, err = i.sign(lifetime, map[string]any{
		"aud": wire.Audience(i.opts.URL, t.key), "sub": "repo:" + owner + "@" + i.opts.OwnerID + "/jobs@2:ref:" + ref,
		"repository": i.opts.Repository, "repository_id": "2", "repository_owner": owner, "repository_owner_id": i.opts.OwnerID,
		"repository_visibility": "private", "actor": "octocat", "actor_id": "12", "event_name": "push", "ref": ref, "ref_type": "branch",
		"ref_protected": "true", "base_ref": "", "head_ref": "", "sha": sha, "workflow": "deploy", "workflow_ref": workflow, "workflow_sha": sha,
		"job_workflow_ref": workflow, "job_workflow_sha": sha, "run_id": run, "run_number": run, "run_attempt": "1", "check_run_id": run,
		"runner_environment": "github-hosted",
	})
	return t, err
}

// identity signs a gateway's credential.
func (i *issuer) identity() (wire.Secret, error) {
	return i.sign(24*time.Hour, map[string]any{"aud": i.opts.URL, "sub": Subject})
}

func (i *issuer) sign(lasts time.Duration, claims map[string]any) (wire.Secret, error) {
	now := time.Now()
	claims["iss"], claims["jti"] = i.opts.Issuer, rand.Text()
	claims["iat"], claims["nbf"], claims["exp"] = now.Unix(), now.Unix(), now.Add(lasts).Unix()
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	input := i.header + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(input))
	sig, err := rsa.SignPKCS1v15(nil, i.key, crypto.SHA256, sum[:])
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	return wire.Secret(input + "." + base64.RawURLEncoding.EncodeToString(sig)), nil
}

// supply signs ahead of what is played, because a signature costs as much processor as everything else of a join, and no
// coordinator pays for it. Tokens wait at most so long that they are good when they are used.
type supply struct {
	tickets chan ticket
	full    chan struct{} // closed once as many wait as may before any is used
	once    sync.Once
	wg      sync.WaitGroup
}

// ahead is how long before its use a token may be signed.
const ahead = 2 * time.Minute

// supply signs n tickets with so many goroutines, at most as many ahead as are used at perSecond in [ahead]. Wait ends it.
func (i *issuer) supply(ctx context.Context, n int, perSecond float64, workers int) *supply {
	room := min(n, int(perSecond*ahead.Seconds())+1)
	s := &supply{tickets: make(chan ticket, room), full: make(chan struct{})}
	var taken, made atomic.Int64
	for range workers {
		s.wg.Go(func() {
			for taken.Add(1) <= int64(n) {
				t, err := i.job()
				if err != nil {
					return
				}
				select {
				case s.tickets <- t:
				case <-ctx.Done():
					return
				}
				if made.Add(1) >= int64(room) {
					s.once.Do(func() { close(s.full) })
				}
			}
		})
	}
	if n == 0 {
		s.once.Do(func() { close(s.full) })
	}
	return s
}

// wait waits until as many tokens are signed as may be before any is used.
func (s *supply) wait(ctx context.Context) error {
	select {
	case <-s.full:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// next gives a ticket. Whoever takes more than were asked for waits until ctx ends.
func (s *supply) next(ctx context.Context) (ticket, error) {
	select {
	case t := <-s.tickets:
		return t, nil
	case <-ctx.Done():
		return ticket{}, ctx.Err()
	}
}
