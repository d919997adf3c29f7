package forward

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestRealPolicy runs flows against the real decisions: loopback is reached only where the gateway's own policy names the
// exact address as well, and another session, the metadata service and the gateway's own addresses never are.
func TestRealPolicy(t *testing.T) {
	target := server(t, "tcp4", echo)
	e := newEnv(t, Limits{})
	e.f.decide = (*policy.Scope).Decide
	all, err := policy.ParseGrant([]wire.Grant{
		grant("tcp 0.0.0.0/0:1-65535"), grant("tcp 127.0.0.1:1-65535"),
	})
	if err != nil {
		t.Fatal(err)
	}
	local, err := policy.ParseGrant([]wire.Grant{grant("tcp 127.0.0.1:1-65535"), grant("tcp 0.0.0.0/0:1-65535")})
	if err != nil {
		t.Fatal(err)
	}
	own := netip.MustParseAddr("10.7.7.7")
	scope := &policy.Scope{
		Offered: all, Overlay: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")},
		Own: func(a netip.Addr) bool { return a == own },
	}
	e.s.SetScope(scope)
	if _, err := e.dial(target); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("loopback by the coordinator's word alone: %v", err)
	}
	e.job.SetAddresses([]netip.Addr{job4, job6})
	for _, to := range []string{"198.18.0.3:80", "169.254.169.254:80", "10.7.7.7:22"} {
		if _, err := e.dial(to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if n := e.s.Counts(); n.Denied != 4 || n.Allowed != 0 {
		t.Errorf("counts: %+v", n)
	}
	both := *scope
	both.Local = local
	e.s.SetScope(&both)
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "through the real policy")
}

func grant(allow string) wire.Grant { return wire.Grant{Rule: "test", Allow: allow} }
