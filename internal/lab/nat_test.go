//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"
)

// How a NAT filters (RFC 4787, section 5).
const (
	byNothing = iota
	byAddress
	byAddressAndPort
)

func TestKindsMapAndFilterAsTheySay(t *testing.T) {
	for _, tc := range []struct {
		kind   Kind
		easy   bool // the same mapping towards every destination
		filter int
	}{
		{Open, true, byNothing},
		{FullCone, true, byNothing},
		{Restricted, true, byAddress},
		{Easy, true, byAddressAndPort},
		{Hard, false, byAddressAndPort},
		{CarrierGrade, false, byAddressAndPort},
	} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			n := empty(t)
			nat := must(n.NAT("nat", NATOptions{Kind: tc.kind}))(t)
			host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
			a, b := must(n.Host("a", HostOptions{}))(t), must(n.Host("b", HostOptions{}))(t)
			socket := open(t, host)
			// Destinations that differ in the port, the address, and both.
			targets := []netip.AddrPort{mirror(t, a, ":7"), mirror(t, a, ":8"), mirror(t, b, ":7"), mirror(t, b, ":9")}
			seen := mappings(t, socket, host.Public(), targets)
			if easy := len(slices.Compact(slices.Sorted(slices.Values(seen)))) == 1; easy != tc.easy {
				t.Errorf("mapped to ports %v, want the same for all: %v", seen, tc.easy)
			}
			if first, last := slices.Min(seen), slices.Max(seen); tc.kind.String() == CarrierGrade.String() && (first < 30000 || last > 30999) {
				t.Errorf("ports %d to %d are not the customer's", first, last)
			}
			// The mapping that was made for a's port 7, knocked at from closer and farther away.
			stranger := must(n.Host("stranger", HostOptions{}))(t)
			at := netip.AddrPortFrom(host.Public(), seen[0])
			for _, knock := range []struct {
				what string
				from *Host
				want bool
			}{
				{"another port of an address that was sent to", a, tc.filter <= byAddress},
				{"an address that was never sent to", stranger, tc.filter <= byNothing},
			} {
				if got := passes(t, open(t, knock.from), socket, at, targets[0], knock.want); got != knock.want {
					t.Errorf("a packet from %s passes: %v, want %v", knock.what, got, knock.want)
				}
			}
			if again := mappings(t, socket, host.Public(), targets); !slices.Equal(seen, again) {
				t.Errorf("the mappings moved from %v to %v", seen, again)
			}
		})
	}
}

// mappings gives the ports under which servers see a socket.
func mappings(t *testing.T, socket net.PacketConn, at netip.Addr, servers []netip.AddrPort) []uint16 {
	t.Helper()
	var ports []uint16
	for _, server := range servers {
		seen := must(Mapped(socket, server, patience))(t)
		if seen.Addr() != at {
			t.Fatalf("seen as %v, want an address of %v", seen, at)
		}
		ports = append(ports, seen.Port())
	}
	return ports
}

// passes reports whether a packet from one socket to an address arrives at the other. What is wanted only decides how long
// to wait: what is dropped is known to be lost when a question that was asked after it has its answer from server.
func passes(t *testing.T, from, to net.PacketConn, at, server netip.AddrPort, wanted bool) bool {
	t.Helper()
	if _, err := from.WriteTo([]byte("knock"), net.UDPAddrFromAddrPort(at)); err != nil {
		t.Fatal(err)
	}
	if !wanted {
		if _, err := to.WriteTo([]byte("who am I?"), net.UDPAddrFromAddrPort(server)); err != nil {
			t.Fatal(err)
		}
	}
	_ = to.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 64)
	for {
		n, sender, err := to.ReadFrom(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return false
		case err != nil:
			t.Fatal(err)
		case string(buf[:n]) == "knock":
			return true
		case !wanted && unmapped(sender) == server:
			return false
		}
	}
}

// The trap: a stranger's packet to the NAT's mapping must not change the mapping of what goes out later.
func TestEasyStaysEasyAfterAKnock(t *testing.T) {
	for _, kind := range []Kind{Easy, Restricted} {
		t.Run(kind.String(), func(t *testing.T) {
			n, mirrors := build(t)
			nat := must(n.NAT("nat", NATOptions{Kind: kind}))(t)
			inside := open(t, must(n.Host("inside", HostOptions{Behind: nat}))(t))
			before := must(Mapped(inside, mirrors[0], patience))(t)

			late := must(n.Host("late", HostOptions{}))(t)
			socket := open(t, late)
			for range 3 {
				if passes(t, socket, inside, before, mirrors[0], false) {
					t.Fatal("a stranger's packet came through")
				}
			}
			port := socket.LocalAddr().(*net.UDPAddr).Port
			to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(late.Addr(), uint16(port)))
			if _, err := inside.WriteTo([]byte("punch"), to); err != nil {
				t.Fatal(err)
			}
			_ = socket.SetReadDeadline(time.Now().Add(patience))
			_, from, err := socket.ReadFrom(make([]byte, 64))
			if err != nil {
				t.Fatal(err)
			}
			if got := from.(*net.UDPAddr).AddrPort(); got.Port() != before.Port() {
				t.Errorf("the mapping moved from %v to %v", before, got)
			}
			if !passes(t, socket, inside, before, mirrors[0], true) {
				t.Error("the hole that was punched is shut")
			}
		})
	}
}

func TestForgottenMappingsAreShut(t *testing.T) {
	n, mirrors := build(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	inside := open(t, must(n.Host("inside", HostOptions{Behind: nat}))(t))
	outside := open(t, must(n.Host("outside", HostOptions{}))(t))
	at := must(Mapped(inside, mirrors[0], patience))(t)
	peer := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.14"), uint16(outside.LocalAddr().(*net.UDPAddr).Port))
	if _, err := inside.WriteTo([]byte("punch"), net.UDPAddrFromAddrPort(peer)); err != nil {
		t.Fatal(err)
	}
	if !passes(t, outside, inside, at, mirrors[0], true) {
		t.Fatal("the hole is not open")
	}
	if err := nat.Forget(); err != nil {
		t.Fatal(err)
	}
	if passes(t, outside, inside, at, mirrors[0], false) {
		t.Error("the hole outlived the NAT's memory")
	}
}

// What the firewalls let out, as a host and as a proxy behind them see it.
func TestFirewallsLetOutWhatTheySay(t *testing.T) {
	for _, tc := range []struct {
		kind             Kind
		http, https, way bool // TCP 80 and 443 of a host, and TCP 443 of a proxy
	}{
		{NoUDP, true, true, true},
		{OnlyHTTPS, false, true, true},
		{OnlyProxy, false, false, true},
	} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			n, mirrors := build(t)
			nat := must(n.NAT("nat", NATOptions{Kind: tc.kind}))(t)
			host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
			proxy := must(n.Host("proxy", HostOptions{Behind: nat, Proxy: true}))(t)
			server := must(n.Host("server", HostOptions{}))(t)
			for _, h := range []*Host{host, proxy} {
				if seen, err := Mapped(open(t, h), mirrors[0], 200*time.Millisecond); err == nil {
					t.Errorf("UDP passes from %s, seen as %v", h.Name(), seen)
				}
			}
			for _, way := range []struct {
				from *Host
				port uint16
				want bool
			}{{host, 80, tc.http}, {host, 443, tc.https}, {proxy, 443, tc.way}} {
				if got := connects(t, way.from, server, way.port, way.want); got != way.want {
					t.Errorf("TCP from %s to port %d passes: %v, want %v", way.from.Name(), way.port, got, way.want)
				}
			}
			if !connects(t, host, proxy, 8888, true) {
				t.Error("the host does not reach its neighbour")
			}
			echo := mirror(t, proxy, ":7")
			must(Mapped(open(t, host), echo, patience))(t)
		})
	}
}

// connects reports whether TCP from one host reaches another.
func connects(t *testing.T, from, to *Host, port uint16, wanted bool) bool {
	t.Helper()
	l := must(to.Listen(fmt.Sprintf(":%d", port)))(t)
	defer l.Close()
	wait := 300 * time.Millisecond // a rule on the way drops it
	if wanted {
		wait = patience
	}
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	conn, err := from.Dial(ctx, "tcp", netip.AddrPortFrom(to.Addr(), port).String())
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// The first host behind an open router is on the internet; its neighbours are not.
func TestOpenIsPublic(t *testing.T) {
	n, mirrors := build(t)
	router := must(n.NAT("router", NATOptions{Kind: Open}))(t)
	first := must(n.Host("first", HostOptions{Behind: router}))(t)
	second := must(n.Host("second", HostOptions{Behind: router}))(t)
	stranger := must(n.Host("stranger", HostOptions{}))(t)
	if first.Public() != first.Addr() || second.Public() != router.Public() || !second.Addr().IsPrivate() {
		t.Fatalf("first %v seen as %v, second %v seen as %v", first.Addr(), first.Public(), second.Addr(), second.Public())
	}
	if !connects(t, stranger, first, 80, true) || !connects(t, first, second, 80, true) || !connects(t, second, first, 80, true) {
		t.Error("the first host cannot be reached from everywhere")
	}
	if connects(t, stranger, second, 80, false) {
		t.Error("a private host can be reached")
	}
	if seen := must(Mapped(open(t, second), mirrors[0], patience))(t); seen.Addr() != router.Public() {
		t.Errorf("the second host is seen as %v, want an address of %v", seen, router.Public())
	}
}

func TestBlockedPairsAreApart(t *testing.T) {
	n, mirrors := build(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
	socket := open(t, host)
	must(Mapped(socket, mirrors[0], patience))(t)
	for range 2 {
		if err := n.Block(mirrors[0].Addr(), host.Public()); err != nil {
			t.Fatal(err)
		}
		if seen, err := Mapped(socket, mirrors[0], 200*time.Millisecond); err == nil {
			t.Errorf("a blocked pair speaks, seen as %v", seen)
		}
		must(Mapped(socket, mirrors[1], patience))(t)
		if err := n.Unblock(host.Public(), mirrors[0].Addr()); err != nil {
			t.Fatal(err)
		}
		must(Mapped(socket, mirrors[0], patience))(t)
	}
}

// A smaller link in the middle swallows what is too big, says nothing, and lets TCP pass.
func TestSmallLinkIsABlackHole(t *testing.T) {
	for _, link := range []Link{{MTU: 1400}, {MTU: 1280}, {MTU: 1400, Delay: time.Millisecond}, {MTU: 1400, Loss: 1e-9}} {
		t.Run(fmt.Sprintf("%+v", link), func(t *testing.T) {
			n := empty(t)
			nat := must(n.NAT("nat", NATOptions{Link: link}))(t)
			host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
			server := must(n.Host("server", HostOptions{}))(t)
			_, stop, err := server.ServeEcho(":7")
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			conn := must(host.Dial(t.Context(), "udp", netip.AddrPortFrom(server.Addr(), 7).String()))(t)
			defer conn.Close()
			const headers = 28
			fits := int(link.MTU) - headers
			for _, size := range []int{fits + 1, fits, 1500 - headers, fits} {
				if got := echoes(t, conn, size, size <= fits); got != (size <= fits) {
					t.Errorf("a packet of %d bytes passes: %v", size+headers, got)
				}
			}
			if got, err := exchange(t, host, server, 300<<10); err != nil || got != 300<<10 {
				t.Errorf("TCP brought %d bytes, %v", got, err)
			}
		})
	}
}

// echoes reports whether a datagram of this size comes back. A smaller one sent after it says when it is lost.
func echoes(t *testing.T, conn net.Conn, size int, wanted bool) bool {
	t.Helper()
	if _, err := conn.Write(bytes.Repeat([]byte{'x'}, size)); err != nil {
		t.Fatalf("sending %d bytes: %v, which a black hole does not say", size, err)
	}
	if !wanted {
		if _, err := conn.Write([]byte("fence")); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 2000)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatalf("waiting for %d bytes: %v", size, err)
	}
	return n == size
}

// exchange sends bytes to a server that sends them back, and counts what comes.
func exchange(t *testing.T, from, to *Host, size int) (int64, error) {
	t.Helper()
	l := must(to.Listen(":80"))(t)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	conn := must(from.Dial(t.Context(), "tcp", netip.AddrPortFrom(to.Addr(), 80).String()))(t)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	go func() {
		_, _ = conn.Write(make([]byte, size))
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	return io.Copy(io.Discard, conn)
}

// With IPv6, hosts have global addresses and a firewall that lets answers in.
func TestIPv6IsFilteredNotMapped(t *testing.T) {
	n := empty(t)
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		t.Skip("this kernel has no IPv6")
	}
	server := must(n.Host("server", HostOptions{IPv6: true}))(t)
	at := netip.AddrPortFrom(server.Addr6(), mirror(t, server, "[::]:7").Port())
	stranger := must(n.Host("stranger", HostOptions{IPv6: true}))(t)
	for _, tc := range []struct {
		kind   Kind
		passes bool
	}{{Hard, false}, {Open, true}} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			nat := must(n.NAT(tc.kind.String(), NATOptions{Kind: tc.kind, IPv6: true}))(t)
			host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
			socket := open(t, host)
			seen := must(Mapped(socket, at, patience))(t)
			if own := netip.AddrPortFrom(host.Addr6(), uint16(socket.LocalAddr().(*net.UDPAddr).Port)); seen != own {
				t.Errorf("seen as %v, want %v", seen, own)
			}
			if got := passes(t, open(t, stranger), socket, seen, at, tc.passes); got != tc.passes {
				t.Errorf("a stranger's packet passes: %v", got)
			}
		})
	}
	blocked := must(n.NAT("blocked", NATOptions{Kind: NoUDP, IPv6: true}))(t)
	host := must(n.Host("blocked", HostOptions{Behind: blocked}))(t)
	if seen, err := Mapped(open(t, host), at, 200*time.Millisecond); err == nil {
		t.Errorf("UDP passes over IPv6, seen as %v", seen)
	}
}

// Programs run on a NAT as well, and see its inner side.
func TestRouterIsAHost(t *testing.T) {
	n, mirrors := build(t)
	nat := must(n.NAT("nat", NATOptions{}))(t)
	host := must(n.Host("inside", HostOptions{Behind: nat}))(t)
	router := nat.Router()
	if got := must(Mapped(open(t, router), mirrors[0], patience))(t); got.Addr() != router.Addr() || got.Addr() != nat.Public() {
		t.Errorf("the NAT itself is seen as %v", got)
	}
	if !connects(t, host, router, 5000, true) {
		t.Error("a host does not reach its router")
	}
	if out, code := run(t, router, "who", Program{}); code != 7 {
		t.Errorf("exit %d: %s", code, out)
	}
}
