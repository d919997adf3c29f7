package forward

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestReachedAddsUp(t *testing.T) {
	var r reached
	db := netip.MustParseAddrPort("10.20.0.5:5432")
	for range 2 {
		r.add(wire.FlowRecord{Proto: "tcp", Name: "db.internal", Addr: db, Verdict: wire.FlowAllowed, Rule: "deploy", BytesUp: 10, BytesDn: 20, Cause: wire.CauseClosed})
	}
	r.add(wire.FlowRecord{Proto: "tcp", Addr: netip.MustParseAddrPort("10.20.0.9:22"), Verdict: wire.FlowRefused, Reason: "no line", Count: 3})
	r.add(wire.FlowRecord{Proto: "icmp", Addr: netip.AddrPortFrom(db.Addr(), 0), Verdict: wire.FlowAllowed})
	list, more := r.list()
	want := []wire.Reached{
		{Proto: "icmp", Target: "10.20.0.5", Verdict: wire.FlowAllowed, Flows: 1},
		{Proto: "tcp", Target: "db.internal:5432", Verdict: wire.FlowAllowed, Rule: "deploy", Flows: 2, BytesUp: 20, BytesDn: 40, Cause: wire.CauseClosed},
		{Proto: "tcp", Target: "10.20.0.9:22", Verdict: wire.FlowRefused, Reason: "no line", Flows: 3},
	}
	if diff := cmp.Diff(want, list); diff != "" || more != 0 {
		t.Errorf("(-want +got), %d more:\n%s", more, diff)
	}
}

// A job that scans cannot make the gateway remember without bound, nor hide what it has reached.
func TestReachedIsBounded(t *testing.T) {
	var r reached
	const scanned = 1000
	for i := range scanned {
		r.add(wire.FlowRecord{Proto: "dns", Name: fmt.Sprintf("x%d.internal", i), Verdict: wire.FlowRefused, Count: 1})
	}
	r.add(wire.FlowRecord{Proto: "tcp", Name: "db.internal", Verdict: wire.FlowAllowed})
	list, more := r.list()
	if len(list) != wire.MaxReached/2+1 || more != scanned-wire.MaxReached/2 || list[0].Target != "db.internal" {
		t.Errorf("%d targets, %d more, first %+v", len(list), more, list[0])
	}
}
