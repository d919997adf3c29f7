package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/requirements"
)

// test tests one target. The name is looked up first, so that a fault of DNS is not taken for one of the firewall.
func (e *examiner) test(ctx context.Context, t requirements.Target, c *Check) {
	if t.URL == "" || !e.proxied(t.URL) {
		addrs, err := resolve(ctx, t.Host)
		c.Addresses = addrs
		if err != nil {
			c.Found = netcheck.Printable(err.Error())
			return
		}
	}
	started := time.Now()
	rtt, found, err := e.reach(ctx, t, c.Addresses)
	if err != nil {
		c.Found = netcheck.Printable(err.Error())
		return
	}
	if rtt == 0 && t.Kind != requirements.DNS {
		rtt = time.Since(started)
	}
	c.OK, c.RTT, c.Found = true, float64(rtt.Round(10*time.Microsecond))/float64(time.Millisecond), netcheck.Printable(found)
}

// resolve looks a name up. An address is its own.
func resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return []netip.Addr{}, fmt.Errorf("the name does not resolve: %w", err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}

// reach does what the target's kind says. A round trip of 0 leaves it to the caller to take the time.
func (e *examiner) reach(ctx context.Context, t requirements.Target, addrs []netip.Addr) (time.Duration, string, error) {
	switch t.Kind {
	case requirements.DNS:
		return 0, "resolves", nil
	case requirements.API:
		return e.api(ctx, t)
	case requirements.HTTPS, requirements.Discovery:
		return e.get(ctx, t)
	case requirements.WebSocket:
		rtt, err := netcheck.PingRelay(ctx, e.Transport, t.URL, e.InsecureHTTP)
		if err != nil {
			return 0, "", errors.New(netcheck.Explain(t.URL, err).Message)
		}
		return rtt, "a relay answers over WebSocket", nil
	case requirements.TCP:
		return connect(ctx, t)
	case requirements.STUN, requirements.RelayUDP:
		return askUDP(ctx, t, addrs)
	}
	return 0, "", fmt.Errorf("nobody knows how to test %q", t.Kind)
}

func (e *examiner) api(ctx context.Context, t requirements.Target) (time.Duration, string, error) {
	u, err := url.Parse(t.URL)
	if err != nil {
		return 0, "", err
	}
	_, conn, err := netcheck.FetchInfo(ctx, e.Transport, u)
	if err != nil {
		return 0, "", errors.New(netcheck.Explain(t.URL, err).Message)
	}
	return 0, "a coordinator answers" + secured(conn), nil
}

func (e *examiner) get(ctx context.Context, t requirements.Target) (time.Duration, string, error) {
	address := t.URL
	if t.Kind == requirements.Discovery {
		address = strings.TrimRight(address, "/") + "/.well-known/openid-configuration"
	}
	resp, conn, err := netcheck.Get(ctx, e.Transport, address)
	if err != nil {
		return 0, "", errors.New(netcheck.Explain(address, err).Message)
	}
	_ = resp.Body.Close()
	if t.Kind == requirements.Discovery && resp.StatusCode != http.StatusOK {
		return 0, "", fmt.Errorf("what answers is no issuer: %s", resp.Status)
	}
	return 0, "answers" + secured(conn), nil
}

// secured tells how a connection was protected.
func secured(conn netcheck.Connection) string {
	if conn.TLS == nil {
		return ", plain HTTP"
	}
	return fmt.Sprintf(", %s, certificate from %s", conn.TLS.Version, conn.TLS.Issuer)
}

func connect(ctx context.Context, t requirements.Target) (time.Duration, string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port))))
	if err != nil {
		return 0, "", err
	}
	return 0, "takes connections", conn.Close()
}

// askUDP asks the first address of each family; one that answers is enough.
func askUDP(ctx context.Context, t requirements.Target, addrs []netip.Addr) (time.Duration, string, error) {
	conn, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	var questions []nat.Question
	seen := map[bool]bool{}
	for _, a := range addrs {
		if !seen[a.Is4()] {
			seen[a.Is4()] = true
			questions = append(questions, nat.Question{Server: netip.AddrPortFrom(a, t.Port), Request: relay.WantRequest})
		}
	}
	answers, err := nat.AskAny(ctx, conn, questions)
	if err != nil {
		return 0, "", fmt.Errorf("nothing can be sent: %w", err)
	}
	for _, a := range answers {
		if !a.Mapped.IsValid() {
			continue
		}
		if _, ok := relay.ParseOffer(a.Message); t.Kind == requirements.RelayUDP && !ok {
			return 0, "", errors.New("what answers is no relay")
		}
		return a.RTT, fmt.Sprintf("answers, sees this host as %s", a.Mapped), nil
	}
	return 0, "", errors.New("no answer: UDP to this port, or what comes back, is dropped on the way")
}
