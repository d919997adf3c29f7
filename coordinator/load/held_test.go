package load

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/culvertnet/culvert/internal/wire"
)

// An offer without its token is still one, with an empty one; what is not written as a coordinator does is left alone.
func TestWithoutToken(t *testing.T) {
	for data, want := range map[string]struct{ rest, token string }{
		`{"body":{"session":"s","token":"a.b-_c","lease":"10m"}}`: {`{"body":{"session":"s","token":"","lease":"10m"}}`, "a.b-_c"},
		`{"body":{"token":""}}`:                                   {`{"body":{"token":""}}`, ""},
		`{"body":{"session":"s"}}`:                                {`{"body":{"session":"s"}}`, ""},
		`{"body":{"token":"a\u002eb"}}`:                           {`{"body":{"token":"a\u002eb"}}`, ""},
		`{"body":{"token":"a","more":{"token":"b"}}}`:             {`{"body":{"token":"a","more":{"token":"b"}}}`, ""},
		`{"body":{"token":"a`:                                     {`{"body":{"token":"a`, ""},
	} {
		if rest, token := withoutToken([]byte(data)); string(rest) != want.rest || token.Reveal() != want.token {
			t.Errorf("%s: %s and %q", data, rest, token.Reveal())
		}
	}
}

// What a played gateway says in a hello is what it was offered.
func TestHeldSessionsAreSaidAsOffered(t *testing.T) {
	h := newHeld()
	lease := wire.Lease{Expires: time.Now().Add(time.Minute), Ends: time.Now().Add(time.Hour)}
	want := map[string]wire.Held{}
	for n, addresses := range [][]netip.Addr{
		{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd63::1")}, {netip.MustParseAddr("10.64.0.2")}, {},
	} {
		o := offer{Key: wire.Key{byte(n + 1)}, Addresses: addresses}
		o.Session = o.Key.SessionID()
		o.Grants = append(o.Grants, struct {
			Rule string `json:"rule"`
		}{[]string{"one", "two"}[n%2]})
		h.take(o, lease)
		want[o.Session] = wire.Held{Session: o.Session, Key: o.Key, Addresses: addresses, Rules: []string{o.Grants[0].Rule}, Expires: lease.Expires, Ends: lease.Ends}
	}
	got := map[string]wire.Held{}
	for _, s := range h.all() {
		got[s.Session] = s
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)); diff != "" {
		t.Errorf("(-offered +said):\n%s", diff)
	}
	for id := range want {
		if !h.drop(id) || h.drop(id) {
			t.Errorf("%s is not dropped once", id)
		}
	}
	if len(h.all()) != 0 {
		t.Error("sessions that were dropped are said")
	}
}
