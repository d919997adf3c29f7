package nat

import (
	"bytes"
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

// Question is one request to one server.
type Question struct {
	Server  netip.AddrPort
	Request func(TxID) []byte // default [BindingRequest]
	// Elsewhere takes the answer only from another address or port than the server's.
	Elsewhere bool
}

// Answer is what came back. Its Mapped is invalid where nothing did that was wanted.
type Answer struct {
	Observation
	From    netip.AddrPort
	Message []byte
}

// Probe asks STUN servers, all at once from one socket, for the address that they see, and gives what those saw that
// answered, in the order of servers. See [Ask].
func Probe(ctx context.Context, conn net.PacketConn, servers []netip.AddrPort) ([]Observation, error) {
	questions := make([]Question, len(servers))
	for i, s := range servers {
		questions[i].Server = s
	}
	answers, err := Ask(ctx, conn, questions)
	if err != nil {
		return nil, err
	}
	var out []Observation
	for _, a := range answers {
		if a.Mapped.IsValid() {
			out = append(out, a.Observation)
		}
	}
	return out, nil
}

// Ask asks all questions at once from one socket, again and again until all are answered or ctx ends, and gives an answer
// for each. Nobody else may read from conn meanwhile, and its read deadline is used. An error tells that the socket itself
// failed, or that nothing could be sent, before there was any answer.
func Ask(ctx context.Context, conn net.PacketConn, questions []Question) ([]Answer, error) {
	return askSome(ctx, conn, questions, len(questions))
}

// AskAny is [Ask] that is content with the first answer.
func AskAny(ctx context.Context, conn net.PacketConn, questions []Question) ([]Answer, error) {
	return askSome(ctx, conn, questions, min(1, len(questions)))
}

// askSome is [Ask] that is content with so many answers.
func askSome(ctx context.Context, conn net.PacketConn, questions []Question, enough int) ([]Answer, error) {
	p := &probe{conn: conn, questions: questions, answers: make([]Answer, len(questions)), sent: map[TxID]attempt{}, open: enough}
	for i := range questions {
		p.answers[i].Server = plain(questions[i].Server)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := p.run(ctx); err != nil && p.open == enough {
		return nil, err
	}
	return p.answers, nil
}

// attempt is one request to one server. Each has a transaction id of its own, so that an answer tells which it answers.
type attempt struct {
	question int
	at       time.Time
}

type probe struct {
	conn      net.PacketConn
	questions []Question
	answers   []Answer // by question
	sent      map[TxID]attempt
	open      int // answers that are still wanted
}

func (p *probe) run(ctx context.Context) error {
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
	for i, q := range p.questions {
		if p.answers[i].Mapped.IsValid() {
			continue
		}
		var id TxID
		_, _ = rand.Read(id[:]) // never fails
		request := q.Request
		if request == nil {
			request = BindingRequest
		}
		p.sent[id] = attempt{i, time.Now()}
		if _, err := p.conn.WriteTo(request(id), net.UDPAddrFromAddrPort(p.answers[i].Server)); err != nil {
			failed = fmt.Errorf("ask %s: %w", q.Server, err)
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
	a, by := &p.answers[asked.question], plain(udp.AddrPort())
	if a.Mapped.IsValid() {
		return
	}
	if elsewhere := p.questions[asked.question].Elsewhere; elsewhere && by == a.Server {
		a.From = by // not what was wanted, but it tells something of the server
		return
	} else if !elsewhere && by != a.Server {
		return
	}
	a.Mapped, a.RTT, a.From, a.Message = plain(mapped), time.Since(asked.at), by, bytes.Clone(b)
	p.open--
}
