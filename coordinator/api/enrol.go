package api

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxEnrolSecret bounds an enrolment secret, in bytes.
const maxEnrolSecret = 1024

// enrolled finds out by which enrolment a gateway may serve the network that it names. Everything that is wrong gets the
// same answer, except for what is wrong with a token: that is its owner's business.
func (a *API) enrolled(r *http.Request) (network string, e config.Enrolment, err error) {
	rules := *a.rules.Load()
	network = r.Header.Get(wire.HeaderNetwork)
	if names := rules.Config.NetworkNames(); network == "" && len(names) == 1 {
		network = names[0]
	}
	scheme, secret := credential(r)
	candidates := rules.Config.Networks[network].Gateways
	switch {
	case strings.EqualFold(scheme, wire.SchemeEnrol):
		e, err = bySecret(candidates, secret)
	case strings.EqualFold(scheme, wire.SchemeBearer):
		e, err = byIdentity(r.Context(), rules, candidates, secret)
	default:
		err = problem.New(problem.Unauthorized, "the gateway carries no credential", "give it --identity-token-file or --enrol-token-file")
	}
	return network, e, err
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
func byIdentity(ctx context.Context, rules Rules, list []config.Enrolment, token wire.Secret) (config.Enrolment, error) {
	if len(token) > wire.MaxToken {
		return config.Enrolment{}, problem.New(problem.TooLarge, "the identity token is larger than 16 KiB", "ask the issuer for fewer claims")
	}
	c, err := rules.Identities.Verify(ctx, token.Reveal(), rules.Config.URL)
	if err != nil {
		return config.Enrolment{}, err
	}
	for _, e := range list {
		if e.Issuer != "" && e.Issuer == c.Issuer && e.Subject == c.Subject {
			return e, nil
		}
	}
	return config.Enrolment{}, notEnrolled()
}

func notEnrolled() error {
	return problem.New(problem.Unauthorized, "this gateway is not enrolled in the network that it names",
		"compare its --network and its credential with the network's `gateways` in the coordinator's configuration")
}

// enrolledIn reports whether a configuration still knows an enrolment.
func enrolledIn(c *config.Config, network string, e config.Enrolment) bool {
	return slices.Contains(c.Networks[network].Gateways, e)
}
