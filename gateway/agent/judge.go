package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// verifier is what a judge asks of package claims.
type verifier interface {
	Verify(ctx context.Context, token, audience string) (*claims.Claims, error)
}

// judge decides for the gateway itself whose jobs get in and what they may reach at most. It believes nothing that the
// coordinator says.
type judge struct {
	coordinator string // the gateway's own flag, never what the coordinator calls itself
	network     string
	issuers     []string
	owners      map[string]struct{} // nil pins none
	ownersOf    string              // the issuer whose owners they are
	policy      atomic.Pointer[policy.Policy]
	digest      [sha256.Size]byte // of the policy file that was read first
	verifier    verifier
	maxSession  time.Duration
}

// ruling is what a judge gives to a job.
type ruling struct {
	local  *policy.Grant // nil where the gateway has no policy of its own
	max    time.Duration
	until  time.Time      // when a rule of the gateway's own expires; zero: never
	policy *policy.Policy // by which it was decided
}

func newJudge(o *Options, v verifier) (j *judge, err error) {
	j = &judge{coordinator: o.Coordinator, network: o.Network, verifier: v, maxSession: o.Limits.MaxSession}
	for _, i := range o.Issuers {
		j.issuers = append(j.issuers, i.URL)
	}
	if len(o.Owners) > 0 {
		j.ownersOf, _ = policy.DefaultIssuer(j.issuers)
		j.owners = map[string]struct{}{}
		for _, id := range o.Owners {
			j.owners[id] = struct{}{}
		}
	}
	if o.PolicyFile == "" {
		return j, nil
	}
	p, digest, err := readPolicy(o.PolicyFile, j.issuers, j.digest)
	if err != nil {
		return nil, err
	}
	j.digest = digest
	j.policy.Store(p)
	return j, nil
}

// verify checks a token for exactly this coordinator and key.
func (j *judge) verify(ctx context.Context, key wire.Key, token wire.Secret) (*claims.Claims, error) {
	if len(token) > wire.MaxToken {
		return nil, problem.New(problem.TooLarge, fmt.Sprintf("the token is larger than %d bytes", wire.MaxToken),
			"send the token as the issuer gave it")
	}
	c, err := j.verifier.Verify(ctx, token.Reveal(), wire.Audience(j.coordinator, key))
	if err != nil {
		return nil, err
	}
	if c.RepositoryID == "" || c.RepositoryOwnerID == "" || c.RunID == "" {
		return nil, problem.New(problem.GatewayRefused, "the token does not say which repository and run it is for",
			"use a token that the issuer gave to a workflow job")
	}
	return c, nil
}

// end is when a session has to be over that was admitted at a time.
func (r *ruling) end(admitted time.Time) time.Time {
	if at := admitted.Add(r.max); r.until.IsZero() || at.Before(r.until) {
		return at
	}
	return r.until
}

// rule holds verified claims against the gateway's pins.
func (j *judge) rule(c *claims.Claims) (ruling, error) {
	if j.owners != nil {
		if _, ok := j.owners[c.RepositoryOwnerID]; !ok || c.Issuer != j.ownersOf {
			return ruling{}, problem.New(problem.GatewayRefused, "the gateway does not admit jobs of this repository's owner",
				"if it should, add the owner's id to the gateway's --owner")
		}
	}
	p := j.policy.Load()
	if p == nil {
		return ruling{max: j.maxSession}, nil
	}
	d := p.Evaluate(time.Now(), j.network, c)
	if !d.Allowed {
		return ruling{}, denied(d)
	}
	local, err := policy.ParseGrant(d.Grants)
	if err != nil {
		return ruling{}, fmt.Errorf("compile the gateway's own grants: %w", err)
	}
	return ruling{local: local, max: min(d.MaxSession, j.maxSession), until: d.Until, policy: p}, nil
}

func denied(d policy.Decision) error {
	const next = "ask whoever runs the gateway to change its --policy file"
	if d.Denial == nil {
		return problem.New(problem.GatewayRefused, "no rule of the gateway's own policy admits this job", next)
	}
	e := problem.New(problem.Denied, "no rule of the gateway's own policy admits this job", next)
	e.Denial = d.Denial
	return e
}

// identity is what must stay the same from a session's admission to its last renewal.
type identity struct {
	issuer, owner, repository, run string
}

func identify(c *claims.Claims) identity {
	return identity{c.Issuer, c.RepositoryOwnerID, c.RepositoryID, c.RunID}
}
