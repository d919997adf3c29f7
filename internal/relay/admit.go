package relay

import (
	"crypto/subtle"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

// maxAnswer is more than any answer takes.
const maxAnswer = 256

// answer handles one STUN message and appends the answer to dst, if there is one. Work goes from cheap to dear, and only
// who has shown that it receives at its address, by its nonce, makes us verify a signature.
func (s *Server) answer(dst, msg []byte, from origin, now int64, count *counts) []byte {
	if !nat.IsSTUN(msg) {
		count.junk.Add(1)
		return dst
	}
	if nat.MessageType(msg) == nat.TypeBindingRequest && from.link == nil {
		answer, ok := AppendBindingResponse(dst, msg, from.addr, func() Offer { return s.offer(from) })
		if !ok {
			count.misfit(msg)
			return dst
		}
		count.stun.Add(1)
		return answer
	}
	b, ok := ParseBind(msg)
	if !ok {
		count.misfit(msg)
		return dst
	}
	a := Answer{ID: b.ID, Unbind: b.Unbind}
	if !s.fresh(b.Nonce, from) {
		count.stale.Add(1)
		a.Code, a.Offer = CodeStaleNonce, s.offer(from)
		return appendWithin(dst, a, nil, len(msg))
	}
	cred, code := s.credential(b.Ticket, from, now)
	switch {
	case code == codeSilent:
		count.limited.Add(1)
		return dst
	case code == 0 && !VerifyMessage(msg, &cred.key):
		code = CodeTicket
	}
	if code == 0 {
		code = s.settle(b, cred, from, now)
	}
	if a.Code = code; code != 0 {
		count.refused.Add(1)
		return appendWithin(dst, a, nil, len(msg))
	}
	count.bound.Add(1)
	a.Mapped = from.addr
	return appendWithin(dst, a, &cred.key, len(msg))
}

// appendWithin appends an answer unless it would be larger than its request.
func appendWithin(dst []byte, a Answer, key *BindKey, limit int) []byte {
	start := len(dst)
	dst = AppendAnswer(dst, a, key)
	if len(dst)-start > limit {
		return dst[:start]
	}
	return dst
}

// offer is what a side needs to bind from where it is.
func (s *Server) offer(to origin) Offer {
	if to.link != nil {
		return Offer{Nonce: to.link.nonce, Key: s.public}
	}
	return Offer{Nonce: s.nonces.give(to.addr), Key: s.public}
}

// fresh reports whether a nonce is one that was given to where the message came from.
func (s *Server) fresh(n Nonce, from origin) bool {
	if from.link != nil {
		return subtle.ConstantTimeCompare(n[:], from.link.nonce[:]) == 1
	}
	return s.nonces.valid(from.addr, n)
}

// codeSilent stands for no answer at all.
const codeSilent = -1

// credential gives what a ticket is worth, or the code that refuses it. A ticket in use is known already.
func (s *Server) credential(t Ticket, from origin, now int64) (*credential, int) {
	if c := s.table.known(t); c != nil && now < c.expires {
		return c, 0
	}
	source := from.addr.Addr()
	if from.link != nil {
		source = from.link.source
	}
	if !s.guard.admit(source, now) {
		return nil, codeSilent
	}
	claims, err := Verify(t, *s.keys.Load(), time.Unix(0, now))
	if err != nil {
		return nil, CodeTicket
	}
	key, err := DeriveBindKey(s.private, claims.Key)
	if err != nil {
		return nil, CodeTicket
	}
	c := &credential{
		ticket: [TicketSize]byte(t), key: key, holder: claims.Key, issued: claims.Issued.Unix(),
		expires: endOf(claims.Expires), rate: s.opts.Rate,
	}
	if claims.Rate != 0 {
		c.rate = min(max(claims.Rate, MinRate), s.opts.Rate)
	}
	return c, 0
}

// endOf gives a time in nanoseconds since 1970, as far as they can be counted.
func endOf(t time.Time) int64 {
	const last = (1<<63 - 1) / int64(time.Second)
	return min(t.Unix(), last) * int64(time.Second)
}

// settle binds or unbinds and gives 0, or the code that refuses.
func (s *Server) settle(m Bind, cred *credential, from origin, now int64) int {
	b := &binding{origin: from, credential: cred}
	if m.Unbind {
		s.release(s.table.unbind(b.session(), b.side(), from))
		return 0
	}
	if from.link != nil && !from.link.remember(b) {
		return CodeFull
	}
	old, code := s.table.bind(b, now)
	if code != 0 {
		s.release(b)
	}
	s.release(old)
	return code
}

// release tells a WebSocket, if it is one, that a binding is no longer its own.
func (s *Server) release(b *binding) {
	if b != nil && b.link != nil {
		b.link.forget(b)
	}
}
