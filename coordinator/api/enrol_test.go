package api

import (
	"context"
	"crypto/sha256"
	"testing"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// believing verifies any token as one with these claims.
type believing struct{ c claims.Claims }

func (b believing) Verify(context.Context, string, string) (*claims.Claims, error) { return &b.c, nil }

// TestIdentityIsIssuerAndSubject: several networks' issuers are believed, each for its own subjects; who is called the same elsewhere is another.
func TestIdentityIsIssuerAndSubject(t *testing.T) {
	list := []config.Enrolment{{SecretSHA256: sha256.Sum256([]byte("secret"))}, {Issuer: "https://east.example", Subject: "gateway"}}
	for _, c := range []struct {
		issuer, subject string
		want            problem.Code
	}{
		{"https://east.example", "gateway", ""},
		{"https://west.example", "gateway", problem.Unauthorized},
		{"https://east.example", "other", problem.Unauthorized},
		{"", "", problem.Unauthorized},
	} {
		rules := Rules{Config: &config.Config{}, Identities: believing{claims.Claims{Issuer: c.issuer, Subject: c.subject}}}
		e, err := byIdentity(t.Context(), rules, list, "token")
		if c.want == "" && (err != nil || e.Enrolment != list[1]) || c.want != "" && problem.CodeOf(err) != c.want {
			t.Errorf("%q of %q: %+v, %v", c.subject, c.issuer, e, err)
		}
	}
}

// TestCredentialsAreLimitedBeforeTheyAreVerified: a gateway that proves again and again who it is makes nobody verify anything.
func TestCredentialsAreLimitedBeforeTheyAreVerified(t *testing.T) {
	s := &stream{proofs: rate.NewLimiter(0, 0)} // without an API that could
	if err := s.prove(t.Context(), wire.Credential{Authorization: "Bearer token"}); problem.CodeOf(err) != problem.RateLimited {
		t.Errorf("got %v", err)
	}
}
