package tunnel

import (
	"bytes"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

// resend is when an unanswered handshake initiation is sent again; doubled with every try. wireguard-go itself waits five
// seconds, which a job should not lose to one dropped datagram.
const (
	resendFirst = 150 * time.Millisecond
	resendTries = 5
)

const (
	// apart is how long two transmissions of one message lie apart at least.
	apart = 20 * time.Millisecond
	// unanswered is after how long the device sees a handshake message again that it has not answered. It must never see one twice at
	// the same time. Of an initiation its workers would answer both, and the keys of the second answer replace those of the first, which the
	// initiator uses, so that nothing comes through until it gives up after 15 s. Of a response both may find the handshake unfinished,
	// and make the same keys twice, with counters that begin anew.
	unanswered = time.Second
	// maxPending bounds the messages that are remembered as handed to the device.
	maxPending = 8
)

// handshake makes WireGuard's handshake survive a lost datagram. The initiator sends the same initiation again until the
// device uses new keys; the responder, whose device would refuse the repetition as a replay, answers it with the response it gave
// before. Neither changes what the protocol proves: the messages are the device's own, bit for bit.
//
// Whoever can forge the source address of a validated path can bring in messages of any content. So nothing that is received
// changes what is remembered: only what the device does, which has verified them.
type handshake struct {
	index atomic.Uint32 // the receiver's index in the last transport message that was sent: it tells keys apart

	mu sync.Mutex

	// As initiator.
	initiation []byte // unanswered; nil if there is none
	resend     time.Time
	tries      int
	last       time.Time // when it was last put on the wire; zero if never

	pending []consumed // messages handed to the device, the latest last

	// As responder.
	answered uint32    // the sender's index of the initiation that it answered last
	response []byte    // and what it answered; nil until it has
	repeated time.Time // when that was last sent again

	completed atomic.Int64  // Unix nanoseconds of when the device last had new keys
	done      chan struct{} // closed when that was the case first; nil where nobody waits
}

// consumed is a handshake message that was handed to the device.
type consumed struct {
	pkt []byte
	at  time.Time
}

// sending notes a message that the device sends. It reports whether there is now one to be sent again later.
func (h *handshake) sending(pkt []byte) bool {
	if len(pkt) < device.MinMessageSize {
		return false
	}
	switch messageType(pkt) {
	case device.MessageTransportType:
		if index := binary.LittleEndian.Uint32(pkt[4:]); index != h.index.Load() {
			h.rekeyed(index)
		}
	case device.MessageInitiationType:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.initiation, h.tries = bytes.Clone(pkt), 0
		h.last = time.Now()
		h.resend = h.last.Add(resendFirst)
		return true
	case device.MessageResponseType:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.answered, h.response = binary.LittleEndian.Uint32(pkt[8:]), bytes.Clone(pkt)
		h.complete()
	}
	return false
}

// rekeyed notes that the device sends under new keys: it has verified a response, or heard from whom it responded to.
func (h *handshake) rekeyed(index uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.index.Store(index)
	h.initiation = nil
	h.complete()
}

// complete notes a handshake. mu is held.
func (h *handshake) complete() {
	if h.completed.Swap(time.Now().UnixNano()) == 0 && h.done != nil {
		close(h.done)
	}
}

// receiving notes a handshake message for the device, and tells whether the device has seen it just now and need not see it again.
// Where it is the initiation that the device has answered already, it gives that answer to be sent again.
func (h *handshake) receiving(pkt []byte) (repeated bool, response []byte) {
	kind := messageType(pkt)
	if kind != device.MessageInitiationType && kind != device.MessageResponseType {
		return false, nil
	}
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if kind == device.MessageInitiationType && h.response != nil && binary.LittleEndian.Uint32(pkt[4:]) == h.answered {
		if now.Sub(h.repeated) < apart {
			return true, nil
		}
		h.repeated = now
		return true, h.response
	}
	for i, c := range h.pending {
		if !bytes.Equal(c.pkt, pkt) {
			continue
		}
		if now.Sub(c.at) < unanswered {
			return true, nil
		}
		h.pending[i].at = now
		return false, nil
	}
	if len(h.pending) >= maxPending {
		h.pending = append(h.pending[:0], h.pending[1:]...)
	}
	h.pending = append(h.pending, consumed{bytes.Clone(pkt), now})
	return false, nil
}

// carried gives the first handshake's initiation to be carried by a check, nil if there is none. It counts as sent.
func (h *handshake) carried(now time.Time) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.initiation == nil || h.completed.Load() != 0 {
		return nil
	}
	h.last, h.resend = now, now.Add(resendFirst)
	return h.initiation
}

// again gives the initiation if it is due to be sent again, or at once where a path has just come up.
func (h *handshake) again(now time.Time, fresh bool) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.initiation == nil || (!fresh && now.Before(h.resend)) || now.Sub(h.last) < apart {
		return nil
	}
	pkt := h.initiation
	h.last = now
	h.tries++
	h.resend = now.Add(resendFirst << h.tries)
	if h.tries >= resendTries {
		h.initiation = nil // the device makes a new one
	}
	return bytes.Clone(pkt) // whoever sends it may put a header before it
}

// unsent notes that the initiation found no path.
func (h *handshake) unsent() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = time.Time{}
}

// wake gives when again wants to be called; zero if never.
func (h *handshake) wake() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.initiation == nil {
		return time.Time{}
	}
	return h.resend
}
