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
	if err == nil {
		err = s.Safe(ctx) // relays elsewhere are told of it
	}
	if err != nil {
		return nil, fmt.Errorf("get the key of relay tickets: %w", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// Secret gives what PutSecret stored under a name; [ErrNotFound] where there is nothing.
func (s *Store) Secret(ctx context.Context, name string) ([]byte, error) {
	msg, err := s.bucket.last(ctx, secretSubject(name))
	if err != nil {
		return nil, err
	}
	if msg == nil || gone(msg) {
		return nil, ErrNotFound
	}
	return msg.Data, nil
}

// PutSecret keeps data under a name for all nodes, over what was there, and for good.
func (s *Store) PutSecret(ctx context.Context, name string, data []byte) error {
	_, err := s.bucket.store(ctx, &nats.Msg{Subject: secretSubject(name), Data: data}, anyRevision)
	if err == nil {
		err = s.Safe(ctx)
	}
	return err
}

// DropSecret forgets what is under a name. It is idempotent.
func (s *Store) DropSecret(ctx context.Context, name string) error {
	msg := &nats.Msg{Subject: secretSubject(name), Header: nats.Header{
		operationHeader:     {operationPurge},
		jetstream.MsgRollup: {jetstream.MsgRollupSubject},
	}}
	_, err := s.bucket.store(ctx, msg, anyRevision, jetstream.WithMsgTTL(markerTTL))
	return err
}

// secretSubject is apart from those of the secrets that the store itself makes.
func secretSubject(name string) string { return subjects + "secret.named." + token(name) }

// secret reads size random bytes under a subject, and creates them where there are none.
func (b *bucket) secret(ctx context.Context, subject string, size int) ([]byte, error) {
	for range maxRaces {
		msg, err := b.last(ctx, subject)
		switch {
		case err != nil:
			return nil, err
		case msg != nil && len(msg.Data) == size:
			return msg.Data, nil
		case msg != nil:
			return nil, fmt.Errorf("it has %d bytes in the state, not %d", len(msg.Data), size)
		}
		fresh := make([]byte, size)
		_, _ = rand.Read(fresh) // never fails, see crypto/rand
		_, err = b.store(ctx, &nats.Msg{Subject: subject, Data: fresh}, 0, jetstream.WithExpectLastSequencePerSubject(0))
		if err != nil && !errors.Is(err, ErrConflict) {
			return nil, err
		}
	}
	return nil, ErrConflict
}
