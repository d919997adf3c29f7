package portmap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// patience is how long a router's answer is waited for before the question is asked again, doubled each time.
const patience = 250 * time.Millisecond

// pcp is a router that speaks PCP.
type pcp struct {
	router netip.AddrPort
	nonce  pcpNonce
}

func probePCP(ctx context.Context, router, self netip.Addr) (method, error) {
	p := &pcp{router: netip.AddrPortFrom(router, pcpPort)}
	_, _ = rand.Read(p.nonce[:]) // never fails
	return p, p.ask(ctx, self, encodeAnnounce(self), func(b []byte) error {
		_, _, err := readPCP(b, pcpAnnounce)
		if err == pcpResult(4) {
			return nil // it speaks PCP, and knows no announcements
		}
		return err
	})
}

func (*pcp) name() string { return "PCP" }

func (p *pcp) add(ctx context.Context, r request) (m mapping, err error) {
	err = p.ask(ctx, r.self, encodeMap(r, p.nonce), func(b []byte) (err error) {
		m, err = readMap(b, r, p.nonce)
		return err
	})
	return m, err
}

// verify asks again: that is how PCP tells, and it writes nothing that was not there.
func (p *pcp) verify(ctx context.Context, r request, _ mapping) (mapping, error) {
	return p.add(ctx, r)
}

func (p *pcp) remove(ctx context.Context, r request, _ mapping) error {
	r.lifetime = 0
	_, err := p.add(ctx, r)
	return err
}

// ask sends a request until read takes an answer, or finds a refusal in it. Answers that are none are passed over.
func (p *pcp) ask(ctx context.Context, self netip.Addr, request []byte, read func([]byte) error) error {
	local := net.UDPAddrFromAddrPort(netip.AddrPortFrom(self, 0))
	// A connected socket takes datagrams from the router's port alone.
	conn, err := net.DialUDP("udp4", local, net.UDPAddrFromAddrPort(p.router))
	if err != nil {
		return fmt.Errorf("reach the router: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, pcpMax+1)
	for wait := patience; ; wait *= 2 {
		if _, err := conn.Write(request); err != nil {
			return fmt.Errorf("ask the router: %w", err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return fmt.Errorf("set a deadline: %w", err)
		}
		for ctx.Err() == nil {
			n, err := conn.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("hear the router: %w", err) // refused by ICMP: nobody listens
			}
			if err := read(buf[:n]); !errors.Is(err, errPCP) {
				return err
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the router does not answer: %w", context.Cause(ctx))
		}
	}
}
