package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var errRefused = errors.New("refused")

// hosts plays addresses: what of them answers, and after how long. Those that are not named never answer.
type hosts struct {
	answer map[string]time.Duration // negative: refuses after that

	mu    sync.Mutex
	tried []string
}

func (h *hosts) dialer(list ...string) *Dialer {
	d := &Dialer{Dialer: net.Dialer{Timeout: 10 * time.Second}}
	d.Lookup = func(context.Context, string) (found []netip.Addr, err error) {
		for _, a := range list {
			found = append(found, netip.MustParseAddr(a))
		}
		return found, nil
	}
	d.dial = func(ctx context.Context, _, addr string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(addr)
		h.mu.Lock()
		h.tried = append(h.tried, host)
		h.mu.Unlock()
		after, ok := h.answer[host]
		if !ok {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		select {
		case <-time.After(after.Abs()):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if after < 0 {
			return nil, errRefused
		}
		return named{host}, nil
	}
	return d
}

type named struct{ name string }

func (named) Read([]byte) (int, error)         { return 0, net.ErrClosed }
func (named) Write([]byte) (int, error)        { return 0, net.ErrClosed }
func (named) Close() error                     { return nil }
func (named) LocalAddr() net.Addr              { return nil }
func (named) RemoteAddr() net.Addr             { return nil }
func (named) SetDeadline(time.Time) error      { return nil }
func (named) SetReadDeadline(time.Time) error  { return nil }
func (named) SetWriteDeadline(time.Time) error { return nil }

// TestDialsSeveralAddresses: an address that does not answer costs 250 ms, one that refuses nothing, and families take turns.
func TestDialsSeveralAddresses(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name   string
		list   []string
		answer map[string]time.Duration
		want   string // the name of the one that answers, or an error
		after  time.Duration
		tried  string
	}{
		{"the first answers", []string{"10.0.0.1", "10.0.0.2"}, map[string]time.Duration{"10.0.0.1": 20 * ms}, "10.0.0.1", 20 * ms, "10.0.0.1"},
		{"the first is silent", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, map[string]time.Duration{"10.0.0.2": 20 * ms}, "10.0.0.2", 270 * ms, "10.0.0.1 10.0.0.2"},
		{"two are silent", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, map[string]time.Duration{"10.0.0.3": 20 * ms}, "10.0.0.3", 520 * ms, "10.0.0.1 10.0.0.2 10.0.0.3"},
		{"the first is far", []string{"10.0.0.1", "10.0.0.2"}, map[string]time.Duration{"10.0.0.1": 300 * ms}, "10.0.0.1", 300 * ms, "10.0.0.1 10.0.0.2"},
		{"the first refuses", []string{"10.0.0.1", "10.0.0.2"}, map[string]time.Duration{"10.0.0.1": -5 * ms, "10.0.0.2": 20 * ms}, "10.0.0.2", 25 * ms, "10.0.0.1 10.0.0.2"},
		{"one family is silent", []string{"fd00::1", "fd00::2", "10.0.0.1"}, map[string]time.Duration{"10.0.0.1": 20 * ms}, "10.0.0.1", 270 * ms, "fd00::1 10.0.0.1"},
		{"all refuse", []string{"10.0.0.1", "10.0.0.2"}, map[string]time.Duration{"10.0.0.1": -5 * ms, "10.0.0.2": -5 * ms}, "dial tcp 10.0.0.1:443: refused", 10 * ms, "10.0.0.1 10.0.0.2"},
		{"nobody answers", []string{"10.0.0.1", "10.0.0.1"}, nil, "context deadline exceeded", 10 * time.Second, "10.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &hosts{answer: c.answer}
				began := time.Now()
				conn, err := h.dialer(c.list...).DialContext(t.Context(), "tcp", "culvert.test:443")
				got := ""
				if err != nil {
					got = err.Error()
				} else {
					got = conn.(named).name
				}
				if got != c.want || time.Since(began) != c.after || strings.Join(h.tried, " ") != c.tried {
					t.Errorf("%s after %s, tried %s; want %s after %s, %s", got, time.Since(began), h.tried, c.want, c.after, c.tried)
				}
			})
		})
	}
}

// TestAvoids: an address that was left comes last for a minute, and is used all the same where no other answers.
func TestAvoids(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hosts{answer: map[string]time.Duration{"10.0.0.1": time.Millisecond, "10.0.0.2": time.Millisecond}}
		d := h.dialer("10.0.0.1", "10.0.0.2")
		dial := func(want string) {
			t.Helper()
			conn, err := d.DialContext(t.Context(), "tcp", "culvert.test:443")
			if err != nil || conn.(named).name != want {
				t.Errorf("%v, %v; want %s", conn, err, want)
			}
		}
		dial("10.0.0.1")
		d.Avoid(netip.MustParseAddrPort("[::ffff:10.0.0.1]:443"))
		dial("10.0.0.2")
		h.answer["10.0.0.2"] = -time.Millisecond
		dial("10.0.0.1")
		h.answer["10.0.0.2"] = time.Millisecond
		dial("10.0.0.2")
		time.Sleep(avoidFor)
		dial("10.0.0.1")
	})
}

// TestDialsOneAddress: what is an address already is dialled as it is, and a name that does not exist says so.
func TestDialsOneAddress(t *testing.T) {
	h := &hosts{answer: map[string]time.Duration{"10.0.0.9": 0}}
	d := h.dialer()
	if conn, err := d.DialContext(t.Context(), "tcp", "10.0.0.9:443"); err != nil || conn.(named).name != "10.0.0.9" {
		t.Error(conn, err)
	}
	missing := &net.DNSError{Err: "no such host", Name: "culvert.test", IsNotFound: true}
	d.Lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, missing }
	_, err := d.DialContext(t.Context(), "tcp", "culvert.test:443")
	if op := (*net.OpError)(nil); !errors.As(err, &op) || !errors.Is(err, missing) || !slices.Equal(h.tried, []string{"10.0.0.9"}) {
		t.Error(err, h.tried)
	}
}
