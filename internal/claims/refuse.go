package claims

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// fresh is the next step where a new token is the cure.
const fresh = "ask the issuer for a fresh token and send it at once"

func invalid(err error, message string) error {
	return problem.Wrap(err, problem.TokenInvalid, message, "send the token exactly as the issuer gave it")
}

func unknownIssuer(iss string) error {
	if iss == "" {
		return invalid(nil, "the token names no issuer")
	}
	return problem.New(problem.TokenIssuer, fmt.Sprintf("the token's issuer %s is not configured here", clip(iss)),
		"list the issuer with exactly this URL under issuers, or run the job where a listed issuer signs its tokens")
}

func unknownKey(issuer, kid string) error {
	return problem.New(problem.TokenUnknownKey, fmt.Sprintf("the token is signed with key %s, which %s does not publish", clip(kid), issuer),
		fresh+"; if the issuer has just changed its keys, try again in a minute")
}

func away(issuer string, err error) error {
	return problem.Wrap(err, problem.IssuerAway, fmt.Sprintf("the keys of %s cannot be fetched and the token's key is not cached", issuer),
		"try again in a moment; if it lasts, let this host reach the issuer over https, or give the issuer a jwks_file")
}

// gaveUp is for a caller whose context ended while keys were being fetched.
func gaveUp(issuer string, err error) error {
	code := problem.Cancelled
	if errors.Is(err, context.DeadlineExceeded) {
		code = problem.Timeout
	}
	return problem.Wrap(err, code, fmt.Sprintf("the keys of %s were still being fetched", issuer), "try again in a moment")
}

// checkAudience wants exactly one audience and exactly this one: a token that several services accept could be replayed
// by one of them.
func (c *Claims) checkAudience(want string) error {
	if len(c.Audience) == 1 && c.Audience[0] == want && want != "" {
		return nil
	}
	message := "the token names no audience"
	switch {
	case len(c.Audience) == 1:
		message = fmt.Sprintf("the token is for audience %s, not for %q", clip(c.Audience[0]), want)
	case len(c.Audience) > 1:
		message = fmt.Sprintf("the token is for %d audiences, it must be for %q alone", len(c.Audience), want)
	}
	return problem.New(problem.TokenAudience, message,
		"ask for a token with exactly this audience; the coordinator's URL must be spelled as in its own configuration")
}

// checkTimes wants sub, exp and iat to be there and now to lie between them, give or take the leeway.
func (c *Claims) checkTimes(now time.Time, leeway time.Duration) error {
	switch {
	case c.Subject == "":
		return missing("sub")
	case c.Expiry.IsZero():
		return missing("exp")
	case c.IssuedAt.IsZero():
		return missing("iat")
	case !now.Before(c.Expiry.Add(leeway)):
		return problem.New(problem.TokenExpired, fmt.Sprintf("the token expired %s ago", now.Sub(c.Expiry).Round(time.Second)),
			fresh+"; if it is fresh, the clock of the coordinator or gateway that says so is wrong: set it")
	}
	for _, t := range []time.Time{c.NotBefore, c.IssuedAt} {
		if t.After(now.Add(leeway)) {
			return problem.New(problem.TokenEarly, fmt.Sprintf("the token becomes valid only in %s", t.Sub(now).Round(time.Second)),
				"set the clock of the coordinator or gateway that says so, or wait; a token just made is valid at once")
		}
	}
	return nil
}

func missing(name string) error {
	return invalid(nil, fmt.Sprintf("the token has no claim %q", name))
}
