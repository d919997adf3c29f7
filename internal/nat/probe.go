package nat

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

// retransmit is how long an answer is waited for before the question is asked again, doubled each time (RFC 8489, section
// 6.2.1, with less patience: whoever waits here is a person or a job).
const retransmit = 200 * time.Millisecond

// Probe asks STUN servers, all at once from one socket, for the address that they see, until all have answered or ctx ends.
// It gives the answers in the order of servers; who did not answer is left out. Nobody else may read from conn meanwhile, and
// its read deadline is used. The error tells that the socket itself failed, or that no question could be sent at all.
func Probe(ctx context.Context, conn net.PacketConn, servers []netip.AddrPort) ([]Observation, error) {
	p := &probe{conn: conn, answers: make([]Observation, len(servers)), sent: map[TxID]attempt{}, open: len(servers)}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err := p.run(ctx, servers)
	var out []Observation
	for _, o := range p.answers {
		if o.Mapped.IsValid() {
			out = append(out, o)
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	return nil, err
}

// attempt is one request to one server. Each has a transaction id of its own, so that an answer tells which it answers.
type attempt struct {
	server int
	at     time.Time
}

type probe struct {
	conn    net.PacketConn
	answers []Observation // by server; not yet valid where there is none
	sent    map[TxID]attempt
	open    int // servers that have not answered
}

func (p *probe) run(ctx context.Context, servers []netip.AddrPort) error {
	for i, s := range servers {
		p.answers[i].Server = plain(s)
	}
	buf := make([]byte, MaxMessage)
	for wait := retransmit; p.open > 0 && ctx.Err() == nil; wait *= 2 {
		if err := p.send(); err != nil {
			return err
		}
		if err := p.receive(ctx, time.Now().Add(wait), buf); err != nil {
			return err
		}
	}
	return nil
}

// send asks everybody who has not answered. It fails where it could ask nobody.
func (p *probe) send() error {
	var asked int
	var failed error
	for i, o := range p.answers {
		if o.Mapped.IsValid() {
			continue
		}
		var id TxID
		_, _ = rand.Read(id[:]) // never fails
		p.sent[id] = attempt{i, time.Now()}
		if _, err := p.conn.WriteTo(BindingRequest(id), net.UDPAddrFromAddrPort(o.Server)); err != nil {
			failed = fmt.Errorf("ask %s: %w", o.Server, err)
			continue
		}
		asked++
	}
	if asked == 0 {
		return failed
	}
	return nil
}

// receive takes answers until everybody has answered or the time has come to ask again.
func (p *probe) receive(ctx context.Context, until time.Time, buf []byte) error {
	if err := p.conn.SetReadDeadline(until); err != nil {
		return fmt.Errorf("set a deadline: %w", err)
	}
	for p.open > 0 && ctx.Err() == nil {
		n, from, err := p.conn.ReadFrom(buf)
		switch {
		case err == nil:
			p.take(buf[:n], from)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("receive: %w", err)
		default: // ICMP's word on one destination, which anybody on the way can send
			time.Sleep(readPause)
		}
	}
	return nil
}

// take notes an answer, if it is one to a request of ours and comes from whom was asked.
func (p *probe) take(b []byte, from net.Addr) {
	id, mapped, err := BindingResponse(b)
	asked, ours := p.sent[id]
	udp, ok := from.(*net.UDPAddr)
	if err != nil || !ours || !ok {
		return
	}
	o := &p.answers[asked.server]
	if plain(udp.AddrPort()) != o.Server || o.Mapped.IsValid() {
		return
	}
	o.Mapped, o.RTT = plain(mapped), time.Since(asked.at)
	p.open--
}
