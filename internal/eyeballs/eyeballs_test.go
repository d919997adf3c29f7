package eyeballs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func targets(n int) []netip.AddrPort {
	out := make([]netip.AddrPort, n)
	for i := range out {
		out[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 1)
	}
	return out
}

// pipe is a connection that tells when it is closed.
type pipe struct {
	net.Conn
	closed chan struct{}
}

func (p *pipe) Close() error { close(p.closed); return nil }

func TestDial(t *testing.T) {
	type answer struct {
		after time.Duration
		err   error // nil for a connection
	}
	silent := answer{time.Hour, context.DeadlineExceeded}
	refused := answer{time.Millisecond, syscall.ECONNREFUSED}
	good := answer{time.Millisecond, nil}
	for name, tt := range map[string]struct {
		answers []answer
		winner  int // -1 for none
		took    time.Duration
	}{
		"the first":                  {[]answer{good, silent}, 0, time.Millisecond},
		"behind one that is silent":  {[]answer{silent, good}, 1, Stagger + time.Millisecond},
		"behind two that are silent": {[]answer{silent, silent, good}, 2, 2*Stagger + time.Millisecond},
		"behind one that refuses":    {[]answer{refused, good}, 1, 2 * time.Millisecond},
		"the second overtakes":       {[]answer{{time.Second, nil}, good}, 1, Stagger + time.Millisecond},
		"all refuse":                 {[]answer{refused, refused}, -1, 2 * time.Millisecond},
		"nobody":                     {nil, -1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conns := make([]*pipe, len(tt.answers))
				start := time.Now()
				got, err := Dial(t.Context(), targets(len(tt.answers)), func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
					i := to.Addr().As4()[3]
					a := tt.answers[i]
					select {
					case <-time.After(a.after):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if a.err != nil {
						return nil, a.err
					}
					conns[i] = &pipe{closed: make(chan struct{})}
					return conns[i], nil
				})
				if took := time.Since(start); took != tt.took {
					t.Errorf("it took %v, want %v", took, tt.took)
				}
				if tt.winner < 0 {
					if got != nil || len(tt.answers) > 0 && !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("got %v, %v", got, err)
					}
					return
				}
				if err != nil || got != net.Conn(conns[tt.winner]) {
					t.Errorf("got %v, %v", got, err)
				}
			})
		})
	}
}

// Who loses the race is closed, who waits is told.
func TestDialLeavesNothingOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := &pipe{closed: make(chan struct{})}
		got, err := Dial(t.Context(), targets(2), func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			if to == targets(2)[1] {
				return &pipe{closed: make(chan struct{})}, nil
			}
			<-ctx.Done()
			return late, nil // has connected just when it was called off
		})
		if err != nil || got == net.Conn(late) {
			t.Fatal(got, err)
		}
		<-late.closed
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := Dial(ctx, targets(1), func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

func TestInterleave(t *testing.T) {
	for in, want := range map[string]string{
		"":                        "[]",
		"10.0.0.1 10.0.0.2 ::1":   "[10.0.0.1 ::1 10.0.0.2]",
		"::1 ::2 ::3 10.0.0.1":    "[::1 10.0.0.1 ::2 ::3]",
		"::1 10.0.0.1 ::2 ::3":    "[::1 10.0.0.1 ::2 ::3]",
		"10.0.0.1":                "[10.0.0.1]",
		"10.0.0.1 10.0.0.2":       "[10.0.0.1 10.0.0.2]",
		"::1 10.0.0.1 10.0.0.2":   "[::1 10.0.0.1 10.0.0.2]",
		"10.0.0.1 ::1 ::2 ::3 ::": "[10.0.0.1 ::1 ::2 ::3 ::]",
	} {
		var addrs []netip.Addr
		for _, s := range strings.Fields(in) {
			addrs = append(addrs, netip.MustParseAddr(s))
		}
		if got := fmt.Sprint(Interleave(addrs)); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
