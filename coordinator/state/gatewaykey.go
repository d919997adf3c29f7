package state

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/culvertnet/culvert/internal/wire"
)

// gatewayKeyLife is how long a gateway's key is remembered after it was last here: longer than any outage, and short
// enough that gateways whose names are made up anew with every start do not pile up.
const gatewayKeyLife = 60 * 24 * time.Hour

// gatewayKeys begins the subjects under which gateways' keys are remembered.
const gatewayKeys = subjects + "gatewaykey."

// RememberGateway keeps the WireGuard key of a network's gateway by its name, and gives the key that it had when it was
// last here: zero where it was not. Two gateways of one name take turns.
func (s *Store) RememberGateway(ctx context.Context, network, name string, key wire.Key) (before wire.Key, err error) {
	subject := gatewayKeys + token(network) + "." + token(name)
	for range maxRaces {
		var last uint64
		before = wire.Key{}
		msg, err := s.bucket.last(ctx, subject)
		if err != nil {
			return before, fmt.Errorf("read a gateway's key: %w", err)
		}
		if msg != nil {
			last = msg.Sequence
			if parsed, perr := wire.ParseKey(string(msg.Data)); perr == nil {
				before = parsed
			}
		}
		_, err = s.bucket.store(ctx, &nats.Msg{Subject: subject, Data: []byte(key.String())}, last,
			jetstream.WithExpectLastSequencePerSubject(last), jetstream.WithMsgTTL(gatewayKeyLife))
		if err == nil {
			return before, nil
		}
		if !errors.Is(err, ErrConflict) {
			return before, fmt.Errorf("keep a gateway's key: %w", err)
		}
	}
	return before, ErrConflict
}
