//go:build linux

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

const (
	behindMTU = 1300 // of the links to the targets
	tooBig    = 1350 // a payload that fits the tunnel with its headers, and not these links
)

// Behind the gateway there are links that take less than the tunnel. What the job does not let be fragmented is answered with what
// fits, as by a router, for datagrams and pings of both families; everything else gets through and back, whatever its size.
func TestTooBigBehindTheGateway(t *testing.T) {
	s := setup(t, stage.Options{Gateway: lab.NATOptions{IPv6: true}, Rules: func(s *stage.Stage) string {
		return fmt.Sprintf("- {name: narrow, network: %s, match: {repository_owner_id: %q}, allow: [\"udp 10.20.0.0/16:%d\", \"icmp 10.20.0.0/16\", \"udp [2001:db8::/32]:%d\", \"icmp [2001:db8::/32]\"]}\n",
			stage.Network, stage.OwnerID, stage.PortEcho, stage.PortEcho)
	}})
	var hosts [3]*lab.Host
	for i := range hosts {
		var err error
		hosts[i], err = s.Net.Host(fmt.Sprintf("narrow%d", i), lab.HostOptions{Behind: s.NATs[1], MTU: behindMTU})
		must(t, err)
		for _, a := range []netip.Addr{hosts[i].Addr(), hosts[i].Addr6()} {
			_, stop, err := hosts[i].ServeEcho(netip.AddrPortFrom(a, stage.PortEcho).String())
			must(t, err)
			t.Cleanup(stop)
		}
	}
	must(t, errors.Join(s.Runner.AllowPing(), s.GatewayBox.AllowPing()))
	up(t, newJob(t, s, stage.JobOptions{}), "tun")

	t.Run("datagram", func(t *testing.T) { isTold(t, datagramsTo(t, s, hosts[0].Addr())) })
	t.Run("datagram6", func(t *testing.T) { isTold(t, datagramsTo(t, s, hosts[0].Addr6())) })
	t.Run("fragments", func(t *testing.T) {
		c := datagramsTo(t, s, hosts[1].Addr())
		c.forbid(t, unix.IP_PMTUDISC_DONT)
		for _, size := range []int{tooBig, 4000, 20000} {
			c.comesBack(t, size)
		}
	})
	t.Run("fragments6", func(t *testing.T) { datagramsTo(t, s, hosts[1].Addr6()).comesBack(t, 4000) })
	t.Run("ping", func(t *testing.T) { isTold(t, pingsTo(t, s, hosts[2].Addr())) })
	t.Run("ping6", func(t *testing.T) { isTold(t, pingsTo(t, s, hosts[2].Addr6())) })
	t.Run("large ping", func(t *testing.T) {
		c := pingsTo(t, s, hosts[1].Addr())
		c.forbid(t, unix.IP_PMTUDISC_DONT)
		c.comesBack(t, 4000)
	})
}

// isTold sends what is too big and must not be fragmented until the runner's kernel has heard what fits; then it sends the same without
// that demand, where the kernel fragments, and wants it back.
func isTold(t *testing.T, c *talk) {
	t.Helper()
	c.forbid(t, unix.IP_PMTUDISC_DO)
	eventually(t, 30*time.Second, "the tunnel's own MTU", func() error { // a moment later than `up` on a slow machine
		if mtu := c.mtu(t); mtu < tooBig+48 {
			return fmt.Errorf("it is %d", mtu)
		}
		return nil
	})
	eventually(t, 30*time.Second, "word of what fits", func() error {
		if err := c.send(tooBig); err != nil && !errors.Is(err, unix.EMSGSIZE) {
			return err
		}
		if mtu := c.mtu(t); mtu != behindMTU {
			return fmt.Errorf("the path MTU is %d", mtu)
		}
		return nil
	})
	c.forbid(t, unix.IP_PMTUDISC_WANT)
	c.comesBack(t, tooBig)
}

// talk is a socket of the runner that is connected to a target which sends back what it gets.
type talk struct {
	net.Conn
	stage *stage.Stage
	to    netip.Addr
	six   bool
	head  int // bytes of the transport header that are part of what is sent
}

func datagramsTo(t *testing.T, s *stage.Stage, to netip.Addr) *talk {
	t.Helper()
	conn, err := s.Runner.Dial(timeout(t, 20*time.Second), "udp", netip.AddrPortFrom(to, stage.PortEcho).String())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return &talk{Conn: conn, stage: s, to: to, six: to.Is6()}
}

func pingsTo(t *testing.T, s *stage.Stage, to netip.Addr) *talk {
	t.Helper()
	const header = 8
	c := &talk{stage: s, to: to, six: to.Is6(), head: header}
	must(t, s.Runner.Do(func() error {
		family, proto, at := unix.AF_INET6, unix.IPPROTO_ICMPV6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16()})
		if to.Is4() {
			family, proto, at = unix.AF_INET, unix.IPPROTO_ICMP, &unix.SockaddrInet4{Addr: to.As4()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		file := os.NewFile(uintptr(fd), "ping")
		defer file.Close()
		if err := unix.Connect(fd, at); err != nil {
			return os.NewSyscallError("connect", err)
		}
		c.Conn, err = net.FileConn(file)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// send sends so many bytes, an echo request's header not counted.
func (c *talk) send(size int) error {
	b := bytes.Repeat([]byte{byte(size)}, c.head+size)
	if c.head > 0 {
		copy(b, []byte{8, 0, 0, 0, 0, 0, 0, 1}) // the kernel puts in identifier and checksum
		if c.six {
			b[0] = 128
		}
	}
	_, err := c.Write(b)
	return err
}

// comesBack sends again and again until an answer of that size has come: the first may fall victim to what the kernels find out by it.
func (c *talk) comesBack(t *testing.T, size int) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("an answer of %d bytes", size), func() error {
		if err := c.send(size); err != nil {
			return err
		}
		buf := make([]byte, 65535)
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := c.Read(buf)
		if err == nil && (n != c.head+size || !bytes.Equal(buf[c.head:n], bytes.Repeat([]byte{byte(size)}, size))) {
			err = fmt.Errorf("an answer of %d bytes", n)
		}
		return err
	})
}

// forbid says what becomes of what is too big: ip(7), IP_MTU_DISCOVER.
func (c *talk) forbid(t *testing.T, how int) {
	t.Helper()
	c.control(t, func(fd int) error {
		if c.six {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, how)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, how)
	})
}

// mtu is the runner's path MTU, as a new socket sees it: a ping socket of IPv6 keeps to the route that it began with.
func (c *talk) mtu(t *testing.T) (mtu int) {
	t.Helper()
	fresh := datagramsTo(t, c.stage, c.to)
	defer fresh.Close()
	fresh.control(t, func(fd int) (err error) {
		if c.six {
			mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU)
		} else {
			mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		}
		return err
	})
	return mtu
}

func (c *talk) control(t *testing.T, f func(fd int) error) {
	t.Helper()
	raw, err := c.Conn.(*net.UDPConn).SyscallConn()
	must(t, err)
	var failed error
	must(t, raw.Control(func(fd uintptr) { failed = f(int(fd)) }))
	must(t, failed)
}
