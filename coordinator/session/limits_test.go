package session

import (
	"fmt"
	"testing"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestOwnerAndRepositoryLimits: whose bucket is empty waits, and nobody else does.
func TestOwnerAndRepositoryLimits(t *testing.T) {
	for name, c := range map[string]struct {
		limits Limits
		other  []any // claims of a job that is not held up
	}{
		"repository": {Limits{Repository: 0.2}, []any{"repository_id", "75", "repository", "acme/other"}},
		"owner":      {Limits{Owner: 0.2}, nil},
		"total":      {Limits{Total: 0.2}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, Options{Limits: c.limits})
			b.gateway("east")
			for range 2 { // 0.2 a second is two at once
				b.job().mustJoin()
			}
			j := b.job()
			req := j.request()
			req.Token += "x" // it is not even looked at
			_, err := b.m.Join(t.Context(), req)
			wantCode(t, err, problem.RateLimited)
			if c.other != nil {
				b.job(c.other...).mustJoin()
			}
		})
	}
}

// TestForgedTokensEmptyNoBucket: whoever writes another's name into a token that is not believed takes nothing from him, and adds
// nothing to the tables.
func TestForgedTokensEmptyNoBucket(t *testing.T) {
	b := newBench(t, Options{Limits: Limits{Owner: 0.2, Repository: 0.2, Total: 0.2}})
	b.gateway("east")
	stranger, err := claimstest.New(b.issuer.URL())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		j := b.job()
		j.claims["repository_owner_id"] = []string{"9919", fmt.Sprint(i)}[i%2]
		req := j.request()
		req.Token = wire.Secret(stranger.Sign(wire.Audience("https://culvert.test", j.key), j.claims))
		_, err := b.m.Join(t.Context(), req)
		wantCode(t, err, problem.TokenUnknownKey)
	}
	if n := b.m.joins.owners.Len() + b.m.joins.repositories.Len(); n != 0 {
		t.Errorf("%d buckets were made for what nobody has proven", n)
	}
	b.job().mustJoin()
}

// TestLimitsAreBounded: however many owners there are, the tables are not larger than that.
func TestLimitsAreBounded(t *testing.T) {
	l := Limits{}
	l.defaults()
	j := l.tables()
	for i := range maxLimited + 1000 {
		j.owners.Charge(fmt.Sprint(i))
	}
	if n := j.owners.Len(); n != maxLimited {
		t.Errorf("%d owners", n)
	}
}
