package state

import (
	"sync"
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestRememberGateway(t *testing.T) {
	url := natsServer(t).ClientURL()
	a, b := open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})
	for i, step := range []struct {
		on            *Store
		network, name string
		key, before   wire.Key
	}{
		{a, "corp", "east", wire.Key{1}, wire.Key{}},
		{b, "corp", "east", wire.Key{1}, wire.Key{1}},
		{b, "corp", "east", wire.Key{2}, wire.Key{1}},
		{a, "corp", "east", wire.Key{3}, wire.Key{2}},
		{a, "lab", "east", wire.Key{4}, wire.Key{}},
		{a, "corp", "east.a b*>", wire.Key{5}, wire.Key{}},
		{b, "corp", "east.a b*>", wire.Key{5}, wire.Key{5}},
		{b, "corp", "", wire.Key{6}, wire.Key{}},
	} {
		if got := must(step.on.RememberGateway(t.Context(), step.network, step.name, step.key)); got != step.before {
			t.Errorf("step %d: %v, want %v", i, got, step.before)
		}
	}
	if n := len(leases(a)) + len(a.Gateways("corp")); n != 0 {
		t.Errorf("the mirror takes keys for %d records", n)
	}
}

// However many say at once who a gateway is, each is told of another key than its own by the one before it.
func TestRememberGatewayRaces(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	var mu sync.Mutex
	seen := map[wire.Key]int{}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			before, err := s.RememberGateway(t.Context(), "corp", "east", wire.Key{byte(i + 1)})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[before]++
		})
	}
	wg.Wait()
	for key, n := range seen {
		if n != 1 {
			t.Errorf("%d are told of %v", n, key)
		}
	}
	if seen[wire.Key{}] != 1 {
		t.Error("nobody was the first")
	}
}
