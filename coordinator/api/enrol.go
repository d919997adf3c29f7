package api

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxEnrolSecret bounds an enrolment secret, in bytes.
const maxEnrolSecret = 1024

// enrolment is by what a gateway may serve a network, and until when it may unless it proves so again.
type enrolment struct {
	config.Enrolment
	expires time.Time // of its identity token; zero for a secret
}

// enrolled finds out by which enrolment a gateway may serve the network that it names. Everything that is wrong gets the
// same answer, except for what is wrong with a token: that is its owner's business.
func (a *API) enrolled(r *http.Request) (network string, e enrolment, err error) {
	network = r.Header.Get(wire.HeaderNetwork)
	if names := a.rules.Load().Config.NetworkNames(); network == "" && len(names) == 1 {
		network = names[0]
	}
	e, err = a.enrolledBy(r.Context(), network, r.Header.Get("Authorization"))
	return network, e, err
}

// enrolledBy is enrolled for a credential as it stands in a header.
func (a *API) enrolledBy(ctx context.Context, network, authorization string) (e enrolment, err error) {
	rules := *a.rules.Load()
	scheme, secret, _ := strings.Cut(authorization, " ")
	secret = strings.TrimSpace(secret)
	candidates := rules.Config.Networks[network].Gateways
	switch {
	case strings.EqualFold(scheme, wire.SchemeEnrol):
		e.Enrolment, err = bySecret(candidates, wire.Secret(secret))
	case strings.EqualFold(scheme, wire.SchemeBearer):
		e, err = byIdentity(ctx, rules, candidates, wire.Secret(secret))
	default:
		err = problem.New(problem.Unauthorized, "the gateway carries no credential", "give it --identity-token-file or --enrol-token-file")
	}
	return e, err
}

// bySecret compares with every enrolment secret of the network, always all of them and in constant time.
func bySecret(list []config.Enrolment, secret wire.Secret) (config.Enrolment, error) {
	if secret == "" || len(secret) > maxEnrolSecret {
		return config.Enrolment{}, notEnrolled()
	}
	sum := sha256.Sum256([]byte(secret.Reveal()))
	found := -1
	for i, e := range list {
		if e.Issuer == "" && subtle.ConstantTimeCompare(sum[:], e.SecretSHA256[:]) == 1 {
			found = i
		}
	}
	if found < 0 {
		return config.Enrolment{}, notEnrolled()
	}
	return list[found], nil
}

// byIdentity verifies a workload identity token for this coordinator and looks for its subject.
func byIdentity(ctx context.Context, rules Rules, list []config.Enrolment, token wire.Secret) (enrolment, error) {
	if len(token) > wire.MaxToken {
		return enrolment{}, problem.New(problem.TooLarge, "the identity token is larger than 16 KiB", "ask the issuer for fewer claims")
	}
	c, err := rules.Identities.Verify(ctx, token.Reveal(), rules.Config.URL)
	if err != nil {
		return enrolment{}, err
	}
	for _, e := range list {
		if e.Issuer != "" && e.Issuer == c.Issuer && e.Subject == c.Subject {
			return enrolment{e, c.Expiry}, nil
		}
	}
	return enrolment{}, notEnrolled()
}

func notEnrolled() error {
	return problem.New(problem.Unauthorized, "this gateway is not enrolled in the network that it names",
		"compare its --network and its credential with the network's `gateways` in the coordinator's configuration")
}

// enrolledIn reports whether a configuration still knows an enrolment.
func enrolledIn(c *config.Config, network string, e config.Enrolment) bool {
	return slices.Contains(c.Networks[network].Gateways, e)
}
