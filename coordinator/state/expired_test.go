package state

import (
	"testing"
	"time"
)

// TestExpired: every node hears of a lease that ran out, one of them speaks for it, and leases that ended otherwise are not
// among those.
func TestExpired(t *testing.T) {
	url := natsServer(t).ClientURL()
	nodes := []*Store{open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})}
	must(nodes[0].CreateLease(t.Context(), testLease("ended", time.Now()), testPool))
	if err := nodes[0].EndLease(t.Context(), "ended"); err != nil {
		t.Fatal(err)
	}
	brief := testLease("lost", time.Now())
	brief.Expires = time.Now().Add(time.Second)
	must(nodes[0].CreateLease(t.Context(), brief, testPool))
	first := 0
	for _, s := range nodes {
		select {
		case l := <-s.Expired():
			if l.Session != "lost" || l.Claims == nil {
				t.Errorf("%+v ran out", l)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a node never heard of it")
		}
		if must(s.ClaimEnd(t.Context(), "lost")) {
			first++
		}
	}
	if first != 1 {
		t.Errorf("%d speak for it", first)
	}
	for _, s := range nodes {
		eventually(t, "all are gone", func() bool { return len(leases(s)) == 0 })
		brief.Over = "ended by the client"
		s.bucket.vanished(brief)
		select {
		case l := <-s.Expired():
			t.Errorf("%s ran out as well", l.Session)
		default:
		}
	}
}
