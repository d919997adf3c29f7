package agent

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/culvertnet/culvert/client/control"
)

func claim(names []string, routes ...string) control.Claim {
	c := control.Claim{Names: names}
	for _, r := range routes {
		c.Routes = append(c.Routes, netip.MustParsePrefix(r))
	}
	return c
}

// What two networks both grant is told once, whichever of the two is asked; what lies in something wider is no clash, but for names, where
// programs cannot mean the narrower one.
func TestInBoth(t *testing.T) {
	for _, c := range []struct {
		name   string
		a, b   control.Claim
		both   []string
		nested []string
	}{
		{"nothing", claim([]string{"db.corp"}, "10.1.0.0/16"), claim([]string{"db.lab"}, "10.2.0.0/16"), nil, nil},
		{"a range", claim(nil, "10.1.0.0/16", "10.3.0.0/16"), claim(nil, "10.3.0.0/16"), []string{"10.3.0.0/16"}, []string{"10.3.0.0/16"}},
		{"a narrower range", claim(nil, "10.0.0.0/8"), claim(nil, "10.2.0.0/16"), nil, []string{"10.2.0.0/16"}},
		{"a name", claim([]string{"db.corp", "x.corp"}), claim([]string{"db.corp"}), []string{"db.corp"}, nil},
		{"a name below a wildcard", claim([]string{"*.corp"}), claim([]string{"db.corp"}), []string{"db.corp"}, nil},
		{"a wildcard below a wildcard", claim([]string{"*.corp"}), claim([]string{"*.svc.corp"}), []string{"*.svc.corp"}, nil},
		{"no wildcard below another", claim([]string{"*.svc.corp"}), claim([]string{"*.xsvc.corp", "svc.corp"}), nil, nil},
	} {
		for _, pair := range [][2]control.Claim{{c.a, c.b}, {c.b, c.a}} {
			if got := inBoth(pair[0], pair[1]); !slices.Equal(got, c.both) {
				t.Errorf("%s: both grant %q, want %q", c.name, got, c.both)
			}
			if got := texts(nested(pair[0].Routes, pair[1].Routes)); !slices.Equal(got, c.nested) {
				t.Errorf("%s: narrower %q, want %q", c.name, got, c.nested)
			}
		}
	}
}

// A service has one address of each family, and the second ends in the first.
func TestMirrors(t *testing.T) {
	services := []netip.Prefix{netip.MustParsePrefix("198.19.0.0/16"), netip.MustParsePrefix("fd63:756c:7665:7274::c613:0/112")}
	if got := texts(mirrors(netip.MustParseAddr("198.19.7.9"), services)); !slices.Equal(got, []string{"fd63:756c:7665:7274::c613:709"}) {
		t.Errorf("got %v", got)
	}
	if got := mirrors(netip.MustParseAddr("198.18.7.9"), services); len(got) > 0 {
		t.Errorf("an address of no service has %v", got)
	}
}
