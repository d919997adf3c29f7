package state

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ticketSeed is the key of the seed that relay tickets are signed with.
const ticketSeed = subjects + "secret.tickets"

// TicketKey gives the key that signs relay tickets. The first node to ask makes it; all others, and all that come after a
// restart, find it. It is kept for as long as the bucket is: a new one would make every ticket that is in use worthless.
func (s *Store) TicketKey(ctx context.Context) (ed25519.PrivateKey, error) {
	seed, err := s.bucket.secret(ctx, ticketSeed, ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("get the key of relay tickets: %w", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// secret reads size random bytes under a subject, and creates them where there are none.
func (b *bucket) secret(ctx context.Context, subject string, size int) ([]byte, error) {
	for range maxRaces {
		msg, err := b.stream.GetLastMsgForSubject(ctx, subject)
		switch {
		case err == nil && len(msg.Data) == size:
			return msg.Data, nil
		case err == nil:
			return nil, fmt.Errorf("it has %d bytes in the state, not %d", len(msg.Data), size)
		case !errors.Is(err, jetstream.ErrMsgNotFound):
			return nil, fmt.Errorf("read from the state's bucket: %w", err)
		}
		fresh := make([]byte, size)
		_, _ = rand.Read(fresh) // never fails, see crypto/rand
		_, err = b.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: fresh}, jetstream.WithExpectLastSequencePerSubject(0))
		if err != nil && !wrongRevision(err) {
			return nil, fmt.Errorf("write to the state's bucket: %w", err)
		}
	}
	return nil, ErrConflict
}
