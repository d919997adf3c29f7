//go:build linux

package scale

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/wire"
)

const (
	dawdlersEach = 500 // connections that one goroutine keeps
	pestWindow   = 256 // connections that wait for what becomes of them
	pestRequests = 4   // on one connection, sent in one piece
	pestEndless  = 64  // one connection in so many sends JSON until it is cut off
	pestPatience = 2 * time.Second
	pestOffers   = 512 // bunches of requests that are made before
)

// pest is one stranger. It uses sockets as they are, and one thread for all bad requests: what it costs is missing for what it torments.
type pest struct {
	b      *testing.B
	to     unix.Sockaddr
	from   unix.Sockaddr
	behalf string
	keep   bool // the proxy's connections stay open

	bunches [][]byte // pestRequests each
	bunch   int      // the last one sent
	endless []byte
	more    []byte // of what has no end
	buf     [16 << 10]byte

	answered, cut, opened int64
}

func newPest(b *testing.B, n *node, from, behalf string) *pest {
	b.Helper()
	to := netip.MustParseAddrPort(n.addr)
	p := &pest{b: b, to: &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())},
		from: &unix.SockaddrInet4{Addr: netip.MustParseAddr(from).As4()}, behalf: behalf, keep: behalf != ""}
	kid := publishedKey(b, n.issuer)
	for i := range pestOffers {
		var bunch []byte
		for j := range pestRequests {
			bunch = append(bunch, p.request(badBody(n, i*pestRequests+j, kid))...)
		}
		p.bunches = append(p.bunches, bunch)
	}
	p.endless = fmt.Appendf(nil, "%sTransfer-Encoding: chunked\r\n\r\n", p.head())
	p.more = []byte("1000\r\n" + strings.Repeat(`{"a":`, 820)[:4096] + "\r\n")
	p.endless = append(p.endless, p.more...)
	return p
}

func (p *pest) head() string {
	h := "POST " + wire.PathSessions + " HTTP/1.1\r\nHost: c\r\n"
	if p.behalf != "" {
		h += "X-Forwarded-For: " + p.behalf + "\r\n"
	}
	return h
}

func (p *pest) request(body string) string {
	return fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", p.head(), len(body), body)
}

// badBody gives rubbish, JSON that nests, a token of a key that nobody has, and one that looks right but for its signature.
func badBody(n *node, i int, kid string) string {
	switch i % 4 {
	case 0:
		return "rubbish"
	case 1:
		return strings.Repeat(`{"a":`, 200)
	case 2:
		kid = fmt.Sprint("k", i)
	}
	enc := base64.RawURLEncoding.EncodeToString
	key, now := wire.Key{1, byte(i >> 8), byte(i)}, time.Now().Unix()
	token := enc(fmt.Appendf(nil, `{"alg":"RS256","kid":%q,"typ":"JWT"}`, kid)) + "." +
		enc(fmt.Appendf(nil, `{"iss":%q,"aud":%q,"sub":"s","iat":%d,"nbf":%d,"exp":%d,"repository_owner_id":"1","repository_id":"2"}`,
			n.issuer, wire.Audience(n.url(), key), now, now, now+300)) + "." + enc(bytes.Repeat([]byte{0x5a}, 256))
	return fmt.Sprintf(`{"network":"load","key":%q,"token":%q}`, key, token)
}

// dial opens a connection without waiting: on loopback it is there, or it is not.
func (p *pest) dial() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	if err = unix.Bind(fd, p.from); err == nil {
		err = unix.Connect(fd, p.to)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// dawdle keeps connections open by a header's byte a second, and opens anew those that are closed.
func (p *pest) dawdle(ctx context.Context) {
	conns := make([]int, dawdlersEach)
	for i := range conns {
		conns[i] = -1
	}
	for sleep(ctx, time.Second) {
		for i, fd := range conns {
			if fd >= 0 && unix.Send(fd, []byte("b"), unix.MSG_NOSIGNAL) != nil {
				_ = unix.Close(fd)
				fd = -1
			}
			if fd < 0 {
				if fd, _ = p.dial(); fd >= 0 {
					_ = unix.Send(fd, []byte(p.head()+"X-A: b"), unix.MSG_NOSIGNAL)
				}
			}
			conns[i] = fd
		}
	}
	for _, fd := range conns {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// sent is a connection on which requests wait for what becomes of them.
type sent struct {
	fd      int
	waiting int64 // requests without an answer
	endless bool
	since   time.Time
}

// pester sends bad requests at their rate. It goes round its connections and waits for none: what has been answered or cut off is counted,
// and the connection is used again, or another one in its place.
func (p *pest) pester(ctx context.Context) {
	conns := make([]sent, pestWindow)
	for i := range conns {
		conns[i].fd = -1
	}
	began, total, idle := time.Now(), int64(0), 0
	for at := 0; ctx.Err() == nil; at++ {
		if ahead := time.Duration(total)*time.Second/badRate - time.Since(began); ahead > time.Millisecond {
			time.Sleep(ahead)
		}
		c := &conns[at%pestWindow]
		if !p.settled(c) {
			if idle++; idle > pestWindow {
				time.Sleep(100 * time.Microsecond)
				idle = 0
			}
			continue
		}
		n := p.send(c)
		total, idle = total+n, 0
		if n == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	for until := time.Now().Add(pestPatience); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		if !slices.ContainsFunc(conns, func(c sent) bool { return !p.settled(&c) }) {
			break
		}
	}
	for i := range conns {
		p.drop(&conns[i])
	}
}

// send writes a bunch, or JSON that does not end, and gives how many requests that were. What the kernel does not take has not been sent.
func (p *pest) send(c *sent) int64 {
	if c.fd < 0 {
		var err error
		if c.fd, err = p.dial(); err != nil {
			c.fd = -1
			return 0
		}
		p.opened++
	}
	p.bunch++
	data, n := p.bunches[p.bunch%len(p.bunches)], int64(pestRequests)
	if c.endless = p.bunch%pestEndless == 0; c.endless {
		data, n = p.endless, 1
	}
	took, err := unix.SendmsgN(c.fd, data, nil, nil, unix.MSG_NOSIGNAL)
	if err != nil || took < len(data) && !c.endless {
		p.drop(c)
		return 0
	}
	c.waiting, c.since = n, time.Now()
	return n
}

// settled finds out what has become of a connection's requests: each has an answer, or the connection is cut off. What is neither for long
// is given up, and not counted.
func (p *pest) settled(c *sent) bool {
	for c.fd >= 0 && c.waiting > 0 {
		n, _, err := unix.Recvfrom(c.fd, p.buf[:], 0)
		switch {
		case n > 0:
			got := min(int64(bytes.Count(p.buf[:n], []byte("HTTP/1.1 "))), c.waiting)
			p.answered, c.waiting = p.answered+got, c.waiting-got
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EAGAIN):
			p.cut += c.waiting
			p.drop(c)
		case time.Since(c.since) > pestPatience:
			p.drop(c)
		default:
			if c.endless {
				_ = unix.Send(c.fd, p.more, unix.MSG_NOSIGNAL) // an error shows when it is read
			}
			return false
		}
	}
	if !p.keep || c.endless {
		p.drop(c)
	}
	return true
}

func (p *pest) drop(c *sent) {
	if c.fd >= 0 {
		_ = unix.Close(c.fd)
	}
	c.fd, c.waiting = -1, 0
}
