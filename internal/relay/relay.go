// Package relay carries the packets of one session between its two sides where they cannot reach each other: the
// protocol, the server and the client's end of a WebSocket.
//
// A relay is pairwise. A ticket, signed by the coordinator, names one session and one side of it; the relay forwards
// between the two sides of one session and to nothing else, and all that it sees is WireGuard's ciphertext.
//
//	side ── Binding request with RELAY-WANT ──► relay    (any STUN server ignores the attribute)
//	side ◄─ mapped address, NONCE, RELAY-KEY ── relay    never larger than the request, no state kept
//	side ── BIND: TICKET, NONCE, MESSAGE-INTEGRITY ──► relay    size, nonce, signature, X25519, integrity, in this order
//	side ── frames, without waiting ──► relay ── the same bytes ──► the other side
//	side ◄─ success, or 438, 401, 486 ── relay
//
// A frame is four bytes, 0x4 and a 28-bit channel (the range that RFC 7983 leaves to TURN channels), and one packet. The
// channel is the same on both sides, so a relay sends what it received as it is. Over a WebSocket the same messages
// travel in blocks, see [Blocks].
package relay

import "time"

// Protocol is the WebSocket subprotocol (RFC 6455, section 1.9).
const Protocol = "culvert-relay.v1"

// Timings that both sides of a relay keep to.
const (
	NonceLife    = 2 * time.Minute  // how long a nonce is given out; it is taken for as long again
	IdleLife     = 10 * time.Minute // how long a binding without any packet lives
	PingInterval = 15 * time.Second // between a server's pings on a WebSocket
	BindTimeout  = 10 * time.Second // how long a WebSocket may stay without a binding
	deadAfter    = 3 * PingInterval // a WebSocket on which nothing was heard for so long is closed
)
