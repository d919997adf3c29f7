// Package eyeballs connects to the first of several addresses that answers (RFC 8305, "happy eyeballs"). Standard library
// only.
package eyeballs

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Stagger is how long one address may keep the next one waiting (RFC 8305, section 5).
const Stagger = 250 * time.Millisecond

// Interleave orders addresses so that families alternate, beginning with that of the first (RFC 8305, section 4).
func Interleave(addrs []netip.Addr) []netip.Addr {
	if len(addrs) == 0 {
		return nil
	}
	var first, second []netip.Addr
	for _, a := range addrs {
		if a.Is4() == addrs[0].Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	out := make([]netip.Addr, 0, len(addrs))
	for i := range max(len(first), len(second)) {
		if i < len(first) {
			out = append(out, first[i])
		}
		if i < len(second) {
			out = append(out, second[i])
		}
	}
	return out
}

// Dial dials the targets in order, the next one as soon as the one before has failed or has kept us waiting, and keeps the
// first connection. It returns when no attempt is under way any more; the error joins those of all attempts.
func Dial(ctx context.Context, targets []netip.AddrPort, dial func(context.Context, netip.AddrPort) (net.Conn, error)) (net.Conn, error) {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // what is still dialling gives up
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	next := time.NewTimer(0)
	defer next.Stop()
	var errs []error
	for started, running := 0, 0; started < len(targets) || running > 0; {
		var due <-chan time.Time
		if started < len(targets) {
			due = next.C
		}
		select {
		case <-due:
			target := targets[started]
			started++
			running++
			next.Reset(Stagger)
			wait.Go(func() {
				conn, err := dial(ctx, target)
				select {
				case results <- result{conn, err}:
				case <-ctx.Done():
					if conn != nil {
						_ = conn.Close()
					}
				}
			})
		case r := <-results:
			running--
			if r.err == nil {
				return r.conn, nil
			}
			errs = append(errs, r.err)
			next.Reset(0)
		case <-ctx.Done():
			return nil, errors.Join(append(errs, ctx.Err())...)
		}
	}
	return nil, errors.Join(errs...)
}
