package names

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestScopeCoversWhatIsGranted(t *testing.T) {
	s, refused := newScope(wire.Names{Exact: []string{"db.internal", "Registry.Corp."}, Suffixes: []string{"svc.corp"}}, nil)
	if len(refused) != 0 {
		t.Errorf("refused %v", refused)
	}
	for name, want := range map[string]bool{
		"db.internal": true, "DB.INTERNAL.": true, "registry.corp": true, "a.svc.corp": true, "a.b.svc.corp": true,
		"svc.corp": false, "xsvc.corp": false, "a.db.internal": false, "internal": false, "corp": false, "": false, ".": false,
		"github.com": false, "db.internal.evil.example": false,
	} {
		if got := s.covers(name); got != want {
			t.Errorf("covers(%q) = %v", name, got)
		}
	}
	if got, want := s.domains(), []string{"db.internal", "registry.corp", "svc.corp"}; !slices.Equal(got, want) {
		t.Errorf("domains = %v, want %v", got, want)
	}
}

// Whatever a gateway claims, the names that the runner lives on stay the runner's.
func TestReservedNamesAreNotTheTunnels(t *testing.T) {
	claims := wire.Names{
		Exact: []string{"github.com", "API.github.com", "pipelines.actions.githubusercontent.com", "x.blob.core.windows.net",
			"coordinator.example.com", "localhost", "metadata.google.internal", "a..b", "-", "a b", "", "déjà.example"},
		Suffixes: []string{"com", "net", "core.windows.net", "example.com", "github.com", "internal"},
	}
	s, refused := newScope(claims, []string{"Coordinator.Example.com."})
	for _, name := range []string{"github.com", "api.github.com", "results-receiver.actions.githubusercontent.com", "x.blob.core.windows.net",
		"coordinator.example.com", "localhost", "metadata.google.internal", "anything.com"} {
		if s.covers(name) {
			t.Errorf("%s goes into the tunnel", name)
		}
	}
	if got, want := len(refused), len(claims.Exact)-1+len(claims.Suffixes); got < want {
		t.Errorf("%d refused of %d: %v", got, want, refused)
	}
}

func TestReservedNamesHoldForAnyClaim(t *testing.T) {
	label := rapid.SampledFrom([]string{"github", "com", "www", "windows", "net", "corp", "a"})
	name := rapid.Custom(func(t *rapid.T) string {
		text := label.Draw(t, "label")
		for range rapid.IntRange(0, 3).Draw(t, "more") {
			text += "." + label.Draw(t, "label")
		}
		return text
	})
	rapid.Check(t, func(t *rapid.T) {
		s, _ := newScope(wire.Names{
			Exact: rapid.SliceOfN(name, 0, 4).Draw(t, "exact"), Suffixes: rapid.SliceOfN(name, 0, 4).Draw(t, "suffixes"),
		}, nil)
		asked := name.Draw(t, "asked")
		if within(asked, Reserved) && s.covers(asked) {
			t.Errorf("%q goes into the tunnel", asked)
		}
	})
}

func TestParseResolver(t *testing.T) {
	got := parseResolver([]byte("# x\nnameserver 10.0.0.2\nsearch a b\n nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\n"))
	want := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:53"), netip.MustParseAddrPort("[fe80::1%eth0]:53")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}
