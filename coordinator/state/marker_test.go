package state

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// After kill -9 NATS may find a replaced value again once its successor is gone from the stream. So whatever replaces a value,
// an end of its own included, lives as long as the value could have.
func TestWhatReplacesALeaseOutlivesIt(t *testing.T) {
	t.Run("embedded", func(t *testing.T) {
		replacedLeases(t, Options{}, 10*time.Minute+addressGrace) // it says who holds the address, too
	})
	t.Run("cluster", func(t *testing.T) {
		s, address := replacedLeases(t, Options{NATS: []string{natsServer(t).ClientURL()}}, 10*time.Minute)
		if got := left(t, s, addressKind, address); got < 10*time.Minute {
			t.Errorf("address: the marker lives %v, a value under it could live 10 m", got)
		}
	})
}

// left is how long what stands under a key lives in the bucket.
func left(t *testing.T, s *Store, k kind, id string) time.Duration {
	t.Helper()
	msg, err := s.bucket.stream.GetLastMsgForSubject(t.Context(), subjects+prefixes[k]+id)
	if err != nil {
		t.Fatal(err)
	}
	ttl, err := time.ParseDuration(msg.Header.Get(jetstream.MsgTTLHeader))
	if err != nil {
		t.Fatalf("ttl %q: %v", msg.Header.Get(jetstream.MsgTTLHeader), err)
	}
	return ttl
}

// replacedLeases has a shorter lease replace one of ten minutes, and then nothing replace that.
func replacedLeases(t *testing.T, opts Options, marker time.Duration) (s *Store, address string) {
	t.Helper()
	s = open(t, opts)
	l, err := s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool)
	if err != nil {
		t.Fatal(err)
	}
	l.Over, l.Expires = "ended by the client", time.Now().Add(time.Second)
	if l, err = s.UpdateLease(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if got := left(t, s, leaseKind, token(l.Session)); got < 9*time.Minute {
		t.Errorf("the shortened lease lives %v in the bucket, the one it replaces could live 10 m", got)
	}
	if err := s.EndLease(t.Context(), l.Session); err != nil {
		t.Fatal(err)
	}
	if got := left(t, s, leaseKind, token(l.Session)); got < marker {
		t.Errorf("lease: the marker lives %v, what is under it counts for %v", got, marker)
	}
	return s, addressID(l.Network, l.Addresses[0])
}
