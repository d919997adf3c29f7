// Package repair rebuilds packets that a path has lost: forward error correction below WireGuard, between the two ends of a session.
//
// TCP takes a lost packet for a full queue and slows down, the more the longer its round trip: at 1 % of loss and 40 ms one
// connection gets 3 Mbit/s, whatever the path carries (Mathis et al., 1997). Where the loss has another cause, the sender
// adds a parity packet to every few packets, and the receiver rebuilds one that is missing before TCP notices.
//
//	            sender                                      receiver
//	packets ──► [Encoder] ──► packets, parities ──► loss ──► [Decoder] ──► packets, in order
//	               ▲                                            [Tally]
//	            [Governor] ◄──── what the tally has counted ───────┘
//
// Everything here is pure: no input or output, no clock, no goroutine. What knows sockets and time is package tunnel.
//
// # Parity packets
//
// A parity covers [MinGroup] to [MaxGroup] WireGuard transport messages of one key, whose counters follow each other. It is the exclusive or
// of what follows their headers, each padded with zeros to the longest:
//
//	 0  1   2   3   4            8                   16
//	┌──┬───┬───────┬────────────┬───────────────────┬──────────────────────┐
//	│ 5│ n │ xor of│ receiver's │ counter of the    │ xor of what follows  │
//	│  │   │ length│ index      │ first, LE         │ the n headers        │
//	└──┴───┴───────┴────────────┴───────────────────┴──────────────────────┘
//
// It is as long as the longest packet that it covers, so it fits wherever that fits and the kernel segments both in one run. WireGuard's
// messages begin with 1 to 4, relays' frames with 0x4 in the upper half, and our STUN methods with bytes below 4, so 5 is free.
//
// Nothing here is authenticated, because WireGuard authenticates what is rebuilt: whoever forges a parity gains one packet that the
// device refuses. It counts as well as any other that could be forged in its place.
package repair
