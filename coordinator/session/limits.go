package session

import (
	"strings"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
)

// Limits bound how many joins are judged, a second. Ten times as many may come at once: a matrix has 256 jobs, and 500 runs may
// start within ten seconds.
type Limits struct {
	Owner      float64 // of one owner's jobs; default 500
	Repository float64 // of one repository's; default 200
	Total      float64 // of all; default 2000
}

const (
	limitBurst = 10      // seconds' worth that may come at once
	maxLimited = 1 << 16 // owners, and repositories, that are told apart

	strangerRate  = 1 // denials a second, of all jobs whose owner no rule names, that are written down one by one
	strangerBurst = 100
)

func (l *Limits) defaults() {
	for v, otherwise := range map[*float64]float64{&l.Owner: 500, &l.Repository: 200, &l.Total: 2000} {
		if *v <= 0 {
			*v = otherwise
		}
	}
}

// joins limits joins by who the job is. Before a signature is checked, the token's word only chooses which bucket is looked
// at; tokens are taken from a bucket once it is known whose job it is. So nobody empties another one's bucket, and whoever has
// emptied his own costs no more than reading his name.
type joins struct {
	owners       *limit.Table[string]
	repositories *limit.Table[string]
	all          *limit.Table[struct{}]
	// strangers bounds what is written down of those whom no rule names. Anybody gets tokens for a repository of his own: he must not fill the
	// audit log with it until what others did falls out of it.
	strangers *rate.Limiter
}

func (l *Limits) tables() joins {
	burst := func(r float64) int { return max(int(r*limitBurst), 1) }
	return joins{
		owners:       limit.New[string](rate.Limit(l.Owner), burst(l.Owner), maxLimited),
		repositories: limit.New[string](rate.Limit(l.Repository), burst(l.Repository), maxLimited),
		all:          limit.New[struct{}](rate.Limit(l.Total), burst(l.Total), 1),
		strangers:    rate.NewLimiter(strangerRate, strangerBurst),
	}
}

// identify gives the keys of a token's owner and repository; empty where it names none. Ids of different issuers collide.
func identify(c *claims.Claims) (owner, repository string) {
	key := func(id, name string) string {
		if id == "" {
			id = strings.ToLower(name)
		}
		if id == "" {
			return ""
		}
		return c.Issuer + " " + id
	}
	return key(c.RepositoryOwnerID, c.RepositoryOwner), key(c.RepositoryID, c.Repository)
}

// look says whether a token is worth verifying.
func (j *joins) look(unverified *claims.Claims) error {
	owner, repository := identify(unverified)
	const next = "wait a few seconds and try again, or ask whoever runs the coordinator to raise its limits"
	switch {
	case j.all.Empty(struct{}{}):
		return problem.New(problem.RateLimited, "more jobs join than this coordinator takes", next)
	case owner != "" && j.owners.Empty(owner):
		return problem.New(problem.RateLimited, "too many joins of this repository's owner", next)
	case repository != "" && j.repositories.Empty(repository):
		return problem.New(problem.RateLimited, "too many joins of this repository", next)
	}
	return nil
}

// charge counts a join of whom the token has been proven to be.
func (j *joins) charge(c *claims.Claims) {
	owner, repository := identify(c)
	j.all.Charge(struct{}{})
	if owner != "" {
		j.owners.Charge(owner)
	}
	if repository != "" {
		j.repositories.Charge(repository)
	}
}
