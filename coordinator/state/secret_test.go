package state

import (
	"bytes"
	"crypto/ed25519"
	"sync"
	"testing"
)

func ticketKey(t *testing.T, s *Store) ed25519.PrivateKey {
	t.Helper()
	key, err := s.TicketKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestTicketKeyStays: whoever asks, whenever, gets the same key, and no other state does.
func TestTicketKeyStays(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	key := ticketKey(t, s)
	if again := ticketKey(t, s); !again.Equal(key) {
		t.Error("asked twice, two keys")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if after := ticketKey(t, open(t, Options{Dir: dir})); !after.Equal(key) {
		t.Error("another key after a restart")
	}
	if other := ticketKey(t, open(t, Options{Dir: t.TempDir()})); other.Equal(key) {
		t.Error("two coordinators that share nothing have one key")
	}
}

// TestTicketKeyIsMadeOnce: of several nodes that ask at once, one makes it and all get that.
func TestTicketKeyIsMadeOnce(t *testing.T) {
	url := natsServer(t).ClientURL()
	nodes := []*Store{open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})}
	keys := make([]ed25519.PrivateKey, 16)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() { keys[i], _ = nodes[i%len(nodes)].TicketKey(t.Context()) })
	}
	wg.Wait()
	for _, k := range keys {
		if k == nil || !bytes.Equal(k, keys[0]) {
			t.Fatal("they did not all get one key")
		}
	}
}

// TestTicketKeyOfAnotherSize: what is no seed is refused rather than used or replaced.
func TestTicketKeyOfAnotherSize(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	if _, err := s.bucket.js.Publish(t.Context(), ticketSeed, []byte("short")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.TicketKey(t.Context()); err == nil {
		t.Error("it was taken for a seed")
	}
}
