//go:build linux

package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/stage"
)

// A coordinator without UDP, as on most container platforms, has STUN servers and relays elsewhere. The session takes the nearest
// relay, though another is listed first, goes over to that when the nearest dies, and comes back when it is there again; an open
// connection lives through all of it.
func TestRelaysElsewhere(t *testing.T) {
	// Where the machine is busy with something else for seconds, every path looks dead and the session begins anew.
	const tries = 3
	for try := 1; !changeRelays(t); try++ {
		if try == tries {
			t.Fatalf("the connection ended in each of %d tries", tries)
		}
	}
}

// changeRelays reports whether the connection has lived through it.
func changeRelays(t *testing.T) (lived bool) {
	s := setup(t, stage.Options{NoUDP: true, Rules: grantStream, Relays: []stage.RelayOptions{
		{Name: "far", Link: lab.Link{Delay: 40 * time.Millisecond}},
		{Name: "near"},
	}})
	must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	near := s.Relays[1]
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	on := func(name string) {
		t.Helper()
		is := func(p path) bool { return p.String() == "relay" && p.Relay == name }
		p, took := waitPath(t, job, time.Minute, is)
		if !is(p) {
			t.Fatalf("after a minute the path is %v through %q, want the relay %s", p, p.Relay, name)
		}
		t.Logf("on the relay %s after %v", name, took.Round(10*time.Millisecond))
	}
	on("near")
	touch(t, s)
	stream := startStream(t, s)
	near.Kill()
	on("far")
	touch(t, s)
	must(t, near.Start(timeout(t, 20*time.Second)))
	on("near")
	touch(t, s)
	stream.mu.Lock()
	lived = stream.err == nil
	stream.mu.Unlock()
	stream.stop()
	culvert(t, job, 0, "down")
	return lived
}

// Without any UDP, and without any other relay, WebSockets to the coordinator carry everything.
func TestCoordinatorWithoutUDP(t *testing.T) {
	s := setup(t, stage.Options{NoUDP: true})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	touch(t, s)
	echo(t, s)
}

// A relay believes its coordinators' signatures, as long as what they signed is in force.
func TestRelayTakesTicketsWhileTheyLast(t *testing.T) {
	public, signer, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	s := setup(t, stage.Options{Relays: []stage.RelayOptions{
		{Name: "alone", TicketKeys: []string{base64.RawURLEncoding.EncodeToString(public)}},
	}})
	stranger, err := s.Net.Host("stranger", lab.HostOptions{})
	must(t, err)
	v := &victim{Stage: s, out: stranger, at: s.Relays[0].STUN()}
	now := time.Now()
	for _, tc := range []struct {
		name            string
		issued, expires time.Time
		want            int
	}{
		{"in force", now.Add(-time.Minute), now.Add(time.Minute), 0},
		{"expired", now.Add(-time.Hour), now.Add(-time.Second), relay.CodeTicket},
		{"from the future", now.Add(time.Hour), now.Add(2 * time.Hour), relay.CodeTicket},
	} {
		key := newKey(t)
		secret, err := relay.Sign(signer, relay.Claims{
			Session: key.Public().SessionID(), Side: relay.Client, Key: key.Public(), Issued: tc.issued, Expires: tc.expires,
		})
		must(t, err)
		ticket, err := relay.DecodeTicket(secret)
		must(t, err)
		conn := v.socket(t)
		offer := v.offer(t, conn)
		if got := v.bind(t, conn, key, ticket, offer.Nonce, offer.Key); got != tc.want {
			t.Errorf("%s: the relay says %d, want %d", tc.name, got, tc.want)
		}
	}
}
