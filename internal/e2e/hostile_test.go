//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// hostile is a client of the test's own that keeps to no route: whatever it sends reaches the gateway, so that only the
// gateway's word decides.
type hostile struct {
	device *netstack.Device
	addr   netip.Addr
}

// join makes a hostile client on the coordinator's host, with an honest token.
func joinHostile(t *testing.T, s *stage.Stage) *hostile {
	t.Helper()
	key := newKey(t)
	device, err := netstack.New(netstack.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	var tun *tunnel.Tunnel
	if err := s.Cloud.Do(func() (err error) {
		tun, err = tunnel.New(tunnel.Options{Key: key, TUN: device, Logger: slog.New(slog.DiscardHandler)})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tun.Close() })
	session, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{
		Network: stage.Network, Key: key.Public(),
		Token:      wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key.Public()), stage.Claims(nil))),
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.AddrPortFrom(s.Cloud.Addr(), tun.Port())}},
	})
	if err != nil {
		t.Fatal(err)
	}
	must(t, device.SetAddresses(session.Addresses))
	gateway := session.Gateways[0]
	peer, err := tun.AddPeer(tunnel.PeerOptions{
		Key: gateway.Key, Session: session.ID, Candidates: gateway.Candidates, Initiate: true,
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := peer.WaitHandshake(timeout(t, 10*time.Second)); err != nil {
		t.Fatalf("the hostile client gets no tunnel: %v", err)
	}
	return &hostile{device: device, addr: session.Addresses[0]}
}

// open tries a TCP connection.
func (h *hostile) open(t *testing.T, target string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := h.device.DialContext(ctx, "tcp", target)
	if err != nil {
		return err
	}
	return conn.Close()
}

// everything grants all there is.
func everything(*stage.Stage) string {
	return fmt.Sprintf(`- name: everything
  network: corp
  match: {repository_owner_id: %q}
  allow: ["tcp,udp 0.0.0.0/0:1-65535", "tcp,udp [::/0]:1-65535", "icmp 0.0.0.0/0"]
`, stage.OwnerID)
}

// Inside a grant of everything, what is always denied stays denied, although something listens there on the gateway's own
// host: the metadata address, the gateway's loopback and its own addresses, the other sessions.
func TestAlwaysDenied(t *testing.T) {
	s := setup(t, stage.Options{Rules: everything})
	must(t, s.GatewayBox.AddAddr(netip.MustParseAddr("169.254.169.254")))
	l, err := s.GatewayBox.Listen(":8099")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	neighbour := joinHostile(t, s)
	theirs, err := neighbour.device.ListenTCP(netip.AddrPortFrom(neighbour.addr, 8099))
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	us := joinHostile(t, s)
	if err := us.open(t, s.Target(stage.PortOther)); err != nil {
		t.Fatalf("the wide grant does not give the service: %v", err)
	}
	gateway := s.GatewayBox.Addr().String()
	for _, target := range []string{
		"169.254.169.254:8099", gateway + ":8099", neighbour.addr.String() + ":8099", "198.18.0.1:8099", "198.19.0.1:8099",
		"127.0.0.1:8099", "127.1.2.3:8099", "0.0.0.0:8099",
		"[::ffff:127.0.0.1]:8099", "[::ffff:169.254.169.254]:8099", "[64:ff9b::a9fe:a9fe]:8099", "[::1]:8099",
	} {
		if err := us.open(t, target); err == nil {
			t.Errorf("%s is reachable", target)
		}
	}
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	for _, target := range []string{"169.254.169.254:8099", gateway + ":8099", neighbour.addr.String() + ":8099", "127.0.0.1:8099"} {
		culvert(t, job, problem.FlowDenied.Exit(), "check", target)
	}
	own := culvert(t, job, problem.FlowDenied.Exit(), "check", gateway+":8099").Stdout
	for _, want := range []string{"denied: the gateway's own address", "names exactly " + gateway, "this gateway runs without a --policy of its own"} {
		if !strings.Contains(own, want) {
			t.Errorf("the gateway's own address, without %q: %s", want, own)
		}
	}
}

// A hostile client cannot speak with another's address, nor past its grant.
func TestHostileClientIsHeldToItsGrant(t *testing.T) {
	s := setup(t, stage.Options{})
	us := joinHostile(t, s)
	if err := us.open(t, s.Target(stage.PortHTTP)); err != nil {
		t.Fatalf("the grant does not give the service: %v", err)
	}
	began := time.Now()
	if err := us.open(t, s.Target(stage.PortOther)); err == nil {
		t.Error("a port outside the grant is reachable")
	} else if took := time.Since(began); took > time.Second {
		t.Errorf("refused only after %v: %v", took, err)
	}
	victim := joinHostile(t, s)
	must(t, us.device.SetAddresses([]netip.Addr{victim.addr}))
	if err := us.open(t, s.Target(stage.PortHTTP)); err == nil {
		t.Error("another session's address passes as our own")
	}
	if err := victim.open(t, s.Target(stage.PortHTTP)); err != nil {
		t.Errorf("the victim of the forgery is cut off: %v", err)
	}
}

// refused wants a connection from the runner to be reset at once.
func refused(t *testing.T, from *lab.Host, target string) {
	t.Helper()
	began := time.Now()
	conn, err := from.Dial(timeout(t, 20*time.Second), "tcp", target)
	switch {
	case err == nil:
		conn.Close()
		t.Errorf("%s is reachable", target)
	case !errors.Is(err, syscall.ECONNREFUSED):
		t.Errorf("%s: %v, want connection refused", target, err)
	case time.Since(began) > 10*time.Second:
		t.Errorf("%s: refused only after %v", target, time.Since(began))
	}
}
