package state

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// After kill -9 NATS may find a replaced value again once its successor is gone from the stream. So whatever replaces a value,
// an end of its own included, lives as long as the value could have.
func TestWhatReplacesALeaseOutlivesIt(t *testing.T) {
	s := open(t, Options{})
	l, err := s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool)
	if err != nil {
		t.Fatal(err)
	}
	left := func(k kind, id string) time.Duration {
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
	l.Over, l.Expires = "ended by the client", time.Now().Add(time.Second)
	if l, err = s.UpdateLease(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if got := left(leaseKind, token(l.Session)); got < 9*time.Minute {
		t.Errorf("the shortened lease lives %v in the bucket, the one it replaces could live 10 m", got)
	}
	if err := s.EndLease(t.Context(), l.Session); err != nil {
		t.Fatal(err)
	}
	address := addressID(l.Network, l.Addresses[0])
	for what, got := range map[string]time.Duration{
		"lease": left(leaseKind, token(l.Session)), "address": left(addressKind, address),
	} {
		if got < 10*time.Minute {
			t.Errorf("%s: the marker lives %v, a value under it could live 10 m", what, got)
		}
	}
}
