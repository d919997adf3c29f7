package session

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"regexp"

	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// newSecret makes a session secret, 32 random bytes in base64url, and the SHA-256 of its text that is kept.
func newSecret() (wire.Secret, []byte) {
	var raw [32]byte
	rand.Read(raw[:]) // never fails (crypto/rand)
	secret := base64.RawURLEncoding.EncodeToString(raw[:])
	return wire.Secret(secret), hashOf(secret)
}

func hashOf(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

// sessionID is the form of [wire.Key.SessionID].
var sessionID = regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)

// errUnknown answers alike for a session that does not exist and a secret that is not its own, so that nobody can ask
// which sessions there are.
func errUnknown() error {
	return problem.New(problem.SessionUnknown, "no such session, or not with this secret",
		"join again; a session that was not renewed in time is gone")
}

// authenticate reads the lease of a session for the holder of its secret.
func (m *Manager) authenticate(ctx context.Context, id string, secret wire.Secret) (state.Lease, error) {
	if !sessionID.MatchString(id) {
		return state.Lease{}, errUnknown()
	}
	l, err := m.opts.Store.Lease(ctx, id)
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return state.Lease{}, storeAway(err)
	}
	// Compared even where there is no lease: the answer takes as long. An adopted lease has no hash and no secret fits.
	fits := subtle.ConstantTimeCompare(hashOf(secret.Reveal()), l.SecretHash) == 1
	if err != nil || !fits {
		return state.Lease{}, errUnknown()
	}
	if l.Over != "" {
		return state.Lease{}, problem.New(problem.SessionOver, "the session has ended: "+l.Over, "join again")
	}
	return l, nil
}

// storeAway says that the coordinator cannot do its work just now.
func storeAway(err error) error {
	return problem.Wrap(err, problem.Unreachable, "the coordinator cannot reach its state", "try again in a few seconds")
}
