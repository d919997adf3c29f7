package tunnel

import (
	"bytes"
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
	// apart is how long two transmissions of one initiation lie apart at least.
	apart = 20 * time.Millisecond
	// unanswered is after how long the device sees an initiation again that it has not answered. It must never see one twice at
	// the same time: its workers would answer both, and the keys of the second answer replace those of the first, which the
	// initiator uses, so that nothing comes through until it gives up after 15 s.
	unanswered = time.Second
)

// handshake makes WireGuard's handshake survive a lost datagram. The initiator sends the same initiation again until a
// response comes; the responder, whose device would refuse the repetition as a replay, answers it with the response it gave before.
// Neither changes what the protocol proves: the messages are the device's own, bit for bit.
type handshake struct {
	mu sync.Mutex

	// As initiator.
	initiation []byte // unanswered; nil if there is none
	resend     time.Time
	tries      int
	last       time.Time // when it was last put on the wire; zero if never

	// As responder.
	consumed []byte    // the last initiation handed to the device
	at       time.Time // when that was
	response []byte    // what it answered; nil until it has

	completed atomic.Int64 // Unix nanoseconds of the last response sent or received
}

// sending notes a handshake message that the device sends.
func (h *handshake) sending(pkt []byte) {
	if len(pkt) < device.MinMessageSize {
		return
	}
	switch messageType(pkt) {
	case device.MessageInitiationType:
		h.mu.Lock()
		h.initiation, h.tries = bytes.Clone(pkt), 0
		h.last = time.Now()
		h.resend = h.last.Add(resendFirst)
		h.mu.Unlock()
	case device.MessageResponseType:
		h.mu.Lock()
		h.response = bytes.Clone(pkt)
		h.mu.Unlock()
		h.completed.Store(time.Now().UnixNano())
	}
}

// receiving notes a handshake message for the device. Where it is the initiation that the device has answered already, it
// gives that answer to be sent again, and the device need not see the message.
func (h *handshake) receiving(pkt []byte) (repeated bool, response []byte) {
	switch messageType(pkt) {
	case device.MessageInitiationType:
		h.mu.Lock()
		defer h.mu.Unlock()
		if bytes.Equal(h.consumed, pkt) && (h.response != nil || time.Since(h.at) < unanswered) {
			return true, h.response
		}
		h.consumed, h.at, h.response = bytes.Clone(pkt), time.Now(), nil
	case device.MessageResponseType:
		h.mu.Lock()
		defer h.mu.Unlock()
		h.initiation = nil
		h.completed.Store(time.Now().UnixNano())
	}
	return false, nil
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
	return pkt
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
