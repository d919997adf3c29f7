package state

import (
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
)

// TestGatewayKey: the key that a gateway had before is known by network and name, also after a restart.
func TestGatewayKey(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	odd := strings.Repeat("é. >*", 20)
	for i, step := range []struct {
		network, name string
		key, before   byte
	}{
		{"corp", "east", 1, 0}, {"corp", "east", 1, 1}, {"corp", "east", 2, 1}, {"corp", "west", 1, 0}, {"lab", "east", 3, 0},
		{"corp", "east", 2, 2}, {"corp", odd, 4, 0}, {"corp", odd, 5, 4},
	} {
		if i == 5 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, Options{Dir: dir})
		}
		before, err := s.GatewayKey(t.Context(), step.network, step.name, wire.Key{step.key})
		want := wire.Key{}
		if step.before != 0 {
			want[0] = step.before
		}
		if err != nil || before != want {
			t.Errorf("step %d: %v, %v", i, before, err)
		}
	}
}
