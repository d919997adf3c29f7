//go:build linux

package e2e

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// victim is a session that goes on over the coordinator's relay while strangers try what they can.
type victim struct {
	*stage.Stage
	job    *stage.Job
	stream *stream
	at     netip.AddrPort // of STUN and relay
	out    *lab.Host      // the stranger's
}

func newVictim(t *testing.T) *victim {
	t.Helper()
	s := setup(t, stage.Options{Rules: grantStream})
	must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	stranger, err := s.Net.Host("stranger", lab.HostOptions{})
	must(t, err)
	v := &victim{Stage: s, job: newJob(t, s, stage.JobOptions{}), out: stranger,
		at: netip.AddrPortFrom(s.Cloud.Addr(), stage.PortSTUN)}
	up(t, v.job, "tun")
	v.unmoved(t)
	v.stream = startStream(t, s)
	return v
}

// unmoved wants the session's path to be the relay over UDP.
func (v *victim) unmoved(t *testing.T) {
	t.Helper()
	if p := currentPath(t, v.job); p.String() != "relay" {
		t.Fatalf("the path is %v, want the relay", p)
	}
}

// unharmed wants the session to be as it was, and to have been so all the time.
func (v *victim) unharmed(t *testing.T) {
	t.Helper()
	time.Sleep(1500 * time.Millisecond) // a second of the stream after what was done
	v.unmoved(t)
	v.stream.alive(t)
	if slow := v.stream.slow([]span{{0, time.Second}}); len(slow) > 0 {
		t.Logf("less than 1 Mbit/s in the seconds from %v", slow) // a busy machine does that as well
	}
}

// socket is one of the stranger's.
func (v *victim) socket(t *testing.T) net.PacketConn {
	t.Helper()
	conn, err := v.out.ListenPacket(netip.AddrPortFrom(v.out.Addr(), 0).String())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// ask sends a message and gives the answer that fits, asking again a few times, for UDP may lose either.
func (v *victim) ask(t *testing.T, conn net.PacketConn, message []byte, fits func([]byte) bool) []byte {
	t.Helper()
	buf := make([]byte, 2048)
	for range 20 {
		if _, err := conn.WriteTo(message, net.UDPAddrFromAddrPort(v.at)); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				break
			}
			if fits(buf[:n]) {
				return bytes.Clone(buf[:n])
			}
		}
	}
	t.Fatal("the relay does not answer")
	return nil
}

// offer asks the relay what a bind needs.
func (v *victim) offer(t *testing.T, conn net.PacketConn) relay.Offer {
	t.Helper()
	var offer relay.Offer
	v.ask(t, conn, relay.WantRequest(newID()), func(b []byte) (ok bool) { offer, ok = relay.ParseOffer(b); return ok })
	return offer
}

// bind gives the code of the relay's answer to a bind, 0 for success.
func (v *victim) bind(t *testing.T, conn net.PacketConn, key wire.PrivateKey, ticket relay.Ticket, nonce relay.Nonce, to wire.Key) int {
	t.Helper()
	shared, err := relay.DeriveBindKey(key, to)
	must(t, err)
	request := relay.AppendBind(nil, relay.Bind{ID: newID(), Nonce: nonce, Ticket: ticket}, &shared)
	var answer relay.Answer
	got := v.ask(t, conn, request, func(b []byte) (ok bool) { answer, ok = relay.ParseAnswer(b); return ok })
	if answer.Code != 0 && len(got) > len(request) {
		t.Errorf("%d bytes refuse %d", len(got), len(request))
	}
	return answer.Code
}

func newID() (id nat.TxID) {
	_, _ = rand.Read(id[:])
	return id
}

// member is a session of the stranger's own: an honest one, with honest tickets.
type member struct {
	key     wire.PrivateKey
	session wire.Session
	ticket  relay.Ticket
}

func (v *victim) join(t *testing.T) member {
	t.Helper()
	key := newKey(t)
	token := wire.Secret(v.Issuer.Sign(wire.Audience(v.URL, key.Public()), stage.Claims(nil)))
	session, err := v.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: key.Public(), Token: token})
	must(t, err)
	if len(session.Relays) == 0 {
		t.Fatal("the session has no relay")
	}
	ticket, err := relay.DecodeTicket(session.Relays[0].Ticket)
	must(t, err)
	return member{key, session, ticket}
}

// Whatever a stranger holds, and be it an honest session of its own, the relay gives it nothing of another's.
func TestStrangersGetNothingFromTheRelay(t *testing.T) {
	v := newVictim(t)
	us, others := v.join(t), v.join(t)
	conn := v.socket(t)
	offer := v.offer(t, conn)
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	forge := func(c relay.Claims) relay.Ticket {
		secret, err := relay.Sign(signer, c)
		must(t, err)
		ticket, err := relay.DecodeTicket(secret)
		must(t, err)
		return ticket
	}
	now := time.Now()
	victimID := v.session(t)
	theirs := forge(relay.Claims{Session: victimID, Side: relay.Client, Key: us.key.Public(), Issued: now, Expires: now.Add(time.Hour)})
	spliced := append(bytes.Clone(theirs[:len(theirs)-ed25519.SignatureSize]), us.ticket[len(us.ticket)-ed25519.SignatureSize:]...)
	for _, tc := range []struct {
		name   string
		ticket relay.Ticket
		nonce  relay.Nonce
		want   int
	}{
		{"a nonce of nobody's", us.ticket, relay.Nonce{1}, relay.CodeStaleNonce},
		{"a forged ticket for the victim's session", theirs, offer.Nonce, relay.CodeTicket},
		{"the same under a true signature of another ticket", spliced, offer.Nonce, relay.CodeTicket},
		{"a true ticket of another session", others.ticket, offer.Nonce, relay.CodeTicket},
		{"its own", us.ticket, offer.Nonce, 0},
	} {
		if got := v.bind(t, conn, us.key, tc.ticket, tc.nonce, offer.Key); got != tc.want {
			t.Errorf("%s: the relay says %d, want %d", tc.name, got, tc.want)
		}
	}
	// A nonce is for one address.
	if got := v.bind(t, v.socket(t), us.key, us.ticket, offer.Nonce, offer.Key); got != relay.CodeStaleNonce {
		t.Errorf("another address's nonce: the relay says %d, want %d", got, relay.CodeStaleNonce)
	}
	// Bound as it is, it speaks on the victim's channel.
	id, err := relay.ParseSession(victimID)
	must(t, err)
	frame := binary.BigEndian.AppendUint32(nil, 0x4<<28|uint32(binary.BigEndian.Uint32(id[:]))>>4)
	for range 200 {
		_, err := conn.WriteTo(append(frame, 4, 0, 0, 0, 1, 2, 3, 4), net.UDPAddrFromAddrPort(v.at))
		must(t, err)
	}
	v.unharmed(t)
}

// session is the victim's session id, which is no secret.
func (v *victim) session(t *testing.T) string {
	t.Helper()
	var status struct {
		Session string `json:"session"`
	}
	decode(t, culvert(t, v.job, 0, "status", "--json").Stdout, &status)
	return status.Session
}

// Nothing that a stranger sends to the port is answered with more than it sent.
func TestNoAnswerIsLargerThanItsRequest(t *testing.T) {
	v := newVictim(t)
	us := v.join(t)
	shared, err := relay.DeriveBindKey(us.key, newKey(t).Public())
	must(t, err)
	var requests [][]byte
	for _, whole := range [][]byte{
		relay.WantRequest(newID()), nat.BindingRequest(newID()),
		relay.AppendBind(nil, relay.Bind{ID: newID(), Ticket: us.ticket}, &shared),
		relay.AppendBind(nil, relay.Bind{ID: newID(), Unbind: true, Ticket: us.ticket}, &shared),
	} {
		requests = append(requests, whole)
		for n := 0; n < len(whole); n += 4 {
			cut := bytes.Clone(whole[:n])
			if n >= 20 { // as long as it says it is
				binary.BigEndian.PutUint16(cut[2:], uint16(n-20))
			}
			requests = append(requests, cut)
		}
	}
	for range 300 {
		noise := make([]byte, mathrand.IntN(200))
		_, _ = rand.Read(noise)
		requests = append(requests, noise)
	}
	last := nat.BindingRequest(newID())
	for i, request := range requests {
		conn := v.socket(t)
		_, err := conn.WriteTo(request, net.UDPAddrFromAddrPort(v.at))
		must(t, err)
		// What comes before the answer to a question that was asked later is the answer to the first.
		v.ask(t, conn, last, func(b []byte) bool {
			if _, _, err := nat.BindingResponse(b); err == nil && bytes.Equal(b[8:20], last[8:20]) {
				return true
			}
			if len(b) > len(request) {
				t.Errorf("request %d: %d bytes answer %d", i, len(b), len(request))
			}
			return false
		})
		conn.Close()
	}
	v.unharmed(t)
}

// While 200,000 packets a second that are nothing, or questions of strangers, arrive at the port, a session goes on through it, and
// nothing grows.
func TestFloodsStopNoSession(t *testing.T) {
	for name, trash := range junk {
		t.Run(name, func(t *testing.T) {
			v := newVictim(t)
			before := residentMemory(t, v.Coordinator().Pid())
			began := time.Now()
			f := startFlood(t, v.out, v.at, 200_000, trash)
			time.Sleep(3 * time.Second)
			sent := f.stop()
			t.Logf("%.0f packets a second", float64(sent)/time.Since(began).Seconds())
			touch(t, v.Stage)
			v.stream.alive(t)
			if grown := residentMemory(t, v.Coordinator().Pid()) - before; grown > 64 {
				t.Errorf("the coordinator grew by %.0f MB", grown)
			}
		})
	}
}

// Checks that are not the peer's get no answer from a gateway, and move no path: to a stranger its port is dead.
func TestGatewayIsDeadToStrangers(t *testing.T) {
	s := setup(t, stage.Options{Rules: grantStream, Gateway: lab.NATOptions{Kind: lab.Open}})
	stranger, err := s.Net.Host("stranger", lab.HostOptions{})
	must(t, err)
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	if p, _ := waitPath(t, job, time.Minute, path.direct); !p.direct() {
		t.Fatalf("the path is %v", p)
	}
	stream := startStream(t, s)
	v := &victim{Stage: s, job: job, out: stranger, stream: stream}
	us := v.join(t)
	conn := v.socket(t)
	gateway := us.session.Gateways[0]
	id := v.session(t)
	key := newKey(t)
	secret, err := key.Shared(gateway.Key)
	must(t, err)
	var port netip.AddrPort
	for _, c := range gateway.Candidates {
		if c.Addr.Addr() == s.GatewayBox.Addr() {
			port = c.Addr
		}
	}
	if !port.IsValid() {
		t.Fatalf("the gateway's candidates %v lack its address", gateway.Candidates)
	}
	for _, username := range []string{id + ":" + key.Public().String()[:8], id, us.session.ID + ":" + us.key.Public().String()[:8], "nobody"} {
		for _, k := range [][]byte{secret, []byte("guess"), make([]byte, 32)} {
			check, err := nat.AppendCheck(nil, nat.Check{ID: newID(), Username: username, Nominate: true}, k, 0)
			must(t, err)
			_, err = conn.WriteTo(check, net.UDPAddrFromAddrPort(port))
			must(t, err)
		}
	}
	for _, other := range [][]byte{nat.BindingRequest(newID()), relay.WantRequest(newID()), {1, 0, 0, 0}, bytes.Repeat([]byte{4, 0, 0, 0}, 20)} {
		_, err := conn.WriteTo(other, net.UDPAddrFromAddrPort(port))
		must(t, err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	buf := make([]byte, 2048)
	if n, from, err := conn.ReadFrom(buf); err == nil {
		t.Errorf("%v answers a stranger with %d bytes", from, n)
	}
	stream.alive(t)
	if p := currentPath(t, job); !p.direct() {
		t.Errorf("the path moved to %v", p)
	}
	stream.stop()
	if slow := stream.slow([]span{{0, time.Second}}); len(slow) > 0 {
		t.Logf("less than 1 Mbit/s in the seconds from %v", slow)
	}
}
