package claims

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// GitHub is the issuer of tokens for jobs on github.com.
const GitHub = "https://token.actions.githubusercontent.com"

// Issuer is one issuer whose tokens may be verified.
type Issuer struct {
	URL      string // exactly the token's iss
	JWKSFile string // read the keys from this file instead of fetching them; re-read when it changes
}

// Options configure a [Verifier].
type Options struct {
	Issuers      []Issuer         // default: [GitHub] alone
	Leeway       time.Duration    // for exp, nbf and iat; default 60 s
	RefetchEvery time.Duration    // at most one fetch of an issuer's keys in this time; default 60 s
	FreshFor     time.Duration    // keys are fetched anew, in the background, when they are this old; default 10 min
	InsecureHTTP bool             // accept issuers over plain HTTP beyond loopback
	HTTPClient   *http.Client     // default: 10 s timeout, proxies from the environment
	Now          func() time.Time // default time.Now
	Logger       *slog.Logger     // default: none
}

// Validate fills in the defaults and refuses what cannot work. Its errors are *problem.Error with the code bad-config.
func (o *Options) Validate() error {
	if len(o.Issuers) == 0 {
		o.Issuers = []Issuer{{URL: GitHub}}
	}
	seen := make(map[string]bool)
	for _, issuer := range o.Issuers {
		if seen[issuer.URL] {
			return badIssuer(issuer, errors.New("it is listed twice"))
		}
		seen[issuer.URL] = true
		if err := issuer.validate(o.InsecureHTTP); err != nil {
			return badIssuer(issuer, err)
		}
	}
	if o.Leeway <= 0 {
		o.Leeway = time.Minute
	}
	if o.RefetchEvery <= 0 {
		o.RefetchEvery = time.Minute
	}
	if o.FreshFor <= 0 {
		o.FreshFor = 10 * time.Minute
	}
	o.FreshFor = max(o.FreshFor, o.RefetchEvery)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func badIssuer(issuer Issuer, err error) error {
	return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the issuer %q cannot be used: %v", issuer.URL, err),
		"give each issuer once, by the https URL that its tokens carry as iss")
}

// source is where an issuer's keys come from.
type source interface {
	// find gives the key with this id. Its errors are *problem.Error.
	find(ctx context.Context, kid string) (keys, error)
	// prefetch makes sure that there are keys.
	prefetch(ctx context.Context) error
	// close ends background work and waits for it.
	close()
}

// Verifier verifies tokens of the configured issuers, safe for concurrent use.
type Verifier struct {
	opts    Options
	sources map[string]source // by issuer URL
	http    *fetcher
}

// New checks opts. It fetches nothing yet; key files are read at once, so that a wrong one shows at the start.
func New(opts Options) (*Verifier, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	v := &Verifier{opts: opts, sources: make(map[string]source), http: newFetcher(opts)}
	for _, issuer := range opts.Issuers {
		if issuer.JWKSFile == "" {
			v.sources[issuer.URL] = newRemoteKeys(issuer.URL, v.http, opts)
			continue
		}
		file, err := newFileKeys(issuer, opts.Logger)
		if err != nil {
			return nil, err
		}
		v.sources[issuer.URL] = file
	}
	return v, nil
}

// Prefetch fetches the keys of all issuers, so that the first token need not wait. Failures are logged and joined.
func (v *Verifier) Prefetch(ctx context.Context) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, s := range v.sources {
		wg.Go(func() {
			if err := s.prefetch(ctx); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close ends background work and waits for it. Verifying goes on with the keys that are there.
func (v *Verifier) Close() error {
	for _, s := range v.sources {
		s.close()
	}
	v.http.close()
	return nil
}

// Verify checks signature (RS256 alone), issuer, audience (exactly one value, exactly this), exp, nbf and iat.
// Errors are *problem.Error with the codes token-…, too-large and issuer-unreachable, or cancelled and timeout when ctx
// ends while keys are being fetched.
func (v *Verifier) Verify(ctx context.Context, token, audience string) (*Claims, error) {
	return v.VerifyIf(ctx, token, audience, nil)
}

// VerifyIf is Verify, except that look is asked before any signature is checked. What it is given is nobody's word yet: it may
// say that the work is not to be done, with an error of its own, and remember nothing.
func (v *Verifier) VerifyIf(ctx context.Context, token, audience string, look func(unverified *Claims) error) (*Claims, error) {
	outer, err := parseCompact(token)
	if err != nil {
		return nil, err
	}
	c, err := Parse(outer.payload)
	if err != nil {
		return nil, invalid(err, "the token's claims cannot be read: "+err.Error())
	}
	keys, ok := v.sources[c.Issuer]
	if !ok {
		return nil, unknownIssuer(c.Issuer)
	}
	if look != nil {
		if err := look(c); err != nil {
			return nil, err
		}
	}
	check := &signature{source: keys, token: token, outer: outer}
	config := &oidc.Config{
		ClientID:             audience,
		SkipClientIDCheck:    audience == "", // refused by checkAudience, with a better word
		SupportedSigningAlgs: []string{oidc.RS256},
		SkipExpiryCheck:      true, // checkTimes: go-oidc knows no leeway for exp and has five minutes for nbf
	}
	_, err = oidc.NewVerifier(c.Issuer, check, config).Verify(ctx, token)
	if check.err != nil {
		return nil, check.err
	}
	if !check.valid {
		return nil, invalid(err, "the token's signature was not checked")
	}
	if err := c.checkAudience(audience); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, invalid(err, "the token's claims are not those of an OIDC token")
	}
	if err := c.checkTimes(v.opts.Now(), v.opts.Leeway); err != nil {
		return nil, err
	}
	return c, nil
}

// compactToken is a token's outer form, read before anything of it is believed.
type compactToken struct {
	kid       string // the id of the key that is said to have signed it
	payload   []byte
	signed    string // header and payload, as they stand in the token
	signature string // as it stands there
}

// parseCompact bounds a token and reads its outer form (RFC 7515, section 7.1). The alphabet is checked first, because
// go-oidc also takes the JSON form and skips white space, and both readers must see the same token. go-oidc reads the
// header again and decides by that reading; what is read here only finds the keys to try and says early what is wrong.
func parseCompact(token string) (compactToken, error) {
	malformed := func(err error) (compactToken, error) {
		return compactToken{}, invalid(err, "the token is not a signed JWT in compact form")
	}
	if len(token) > wire.MaxToken {
		return compactToken{}, problem.New(problem.TooLarge, fmt.Sprintf("the token has %d bytes, more than %d", len(token), wire.MaxToken),
			"send the token as the issuer gave it")
	}
	for i := range len(token) {
		if b := token[i]; !isBase64URL(b) && b != '.' {
			return malformed(nil)
		}
	}
	head, rest, _ := strings.Cut(token, ".")
	body, sig, ok := strings.Cut(rest, ".")
	if !ok || head == "" || body == "" || strings.Contains(sig, ".") {
		return malformed(nil)
	}
	raw, err := strictBase64.DecodeString(head)
	if err != nil {
		return malformed(err)
	}
	var header struct {
		Alg  string          `json:"alg"`
		Kid  string          `json:"kid"`
		Crit json.RawMessage `json:"crit"`
	}
	if err := json.Unmarshal(raw, &header); err != nil {
		return malformed(err)
	}
	if header.Crit != nil { // RFC 7515, section 4.1.11: nothing is understood here that it could name
		return compactToken{}, invalid(nil, "the token's header says that something in it is critical, which is not supported")
	}
	if header.Alg != oidc.RS256 {
		return compactToken{}, invalid(nil, fmt.Sprintf("the token is signed with algorithm %s, only RS256 is accepted", clip(header.Alg)))
	}
	payload, err := strictBase64.DecodeString(body)
	if err != nil {
		return malformed(err)
	}
	return compactToken{kid: header.Kid, payload: payload, signed: token[:len(head)+1+len(body)], signature: sig}, nil
}

// strictBase64 takes one spelling of every value.
var strictBase64 = base64.RawURLEncoding.Strict()

func isBase64URL(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '-' || b == '_'
}

// signature is the oidc.KeySet for one verification: it brings the issuer's keys and keeps the error, which go-oidc turns
// into text.
type signature struct {
	source source
	token  string
	outer  compactToken // of token
	valid  bool
	err    error
}

// VerifySignature implements [oidc.KeySet].
func (s *signature) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	if token != s.token {
		return nil, errors.New("another token than the one that was parsed")
	}
	found, err := s.source.find(ctx, s.outer.kid)
	if err != nil {
		s.err = err
		return nil, err
	}
	mark, err := strictBase64.DecodeString(s.outer.signature)
	if err != nil {
		s.err = invalid(err, "the token is not a signed JWT in compact form")
		return nil, s.err
	}
	digest := sha256.Sum256([]byte(s.outer.signed))
	err = errors.New("no key")
	for _, key := range found { // nearly always one; some issuers give two keys one id
		// RS256 (RFC 7518, section 3.3). To have go-jose do it, the token is taken apart a third time, which costs twice what this does.
		if err = rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], mark); err == nil {
			break
		}
	}
	if err != nil {
		s.err = invalid(err, "the token's signature is wrong")
		return nil, s.err
	}
	s.valid = true
	return s.outer.payload, nil
}
