package tunnel

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

func message(kind byte, size int) []byte {
	pkt := make([]byte, size)
	pkt[0] = kind
	return pkt
}

// The device must not see one initiation twice at the same time, and must see it again when it has not answered for long: the
// first may have come before the device had the peer.
func TestRepeatedInitiationReachesTheDeviceLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		initiation := message(device.MessageInitiationType, device.MessageInitiationSize)
		response := message(device.MessageResponseType, device.MessageResponseSize)
		var h handshake
		if repeated, _ := h.receiving(initiation); repeated {
			t.Fatal("the first is kept from the device")
		}
		if repeated, answer := h.receiving(initiation); !repeated || answer != nil {
			t.Fatal("handed to the device twice at once")
		}
		time.Sleep(unanswered)
		if repeated, _ := h.receiving(initiation); repeated {
			t.Fatal("kept from a device that has not answered")
		}
		h.sending(response)
		if repeated, again := h.receiving(initiation); !repeated || len(again) != len(response) {
			t.Errorf("after the answer: repeated %t, %d bytes", repeated, len(again))
		}
	})
}

// A responder repeats its answer to a repeated initiation, and both may come at once: two workers of the device would make keys of it.
func TestRepeatedResponseReachesTheDeviceOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h handshake
		h.sending(initiationFrom(1))
		if repeated, _ := h.receiving(responseTo(1)); repeated {
			t.Fatal("the first is kept from the device")
		}
		if repeated, answer := h.receiving(responseTo(1)); !repeated || answer != nil {
			t.Fatal("handed to the device twice at once")
		}
		if repeated, _ := h.receiving(responseTo(2)); repeated {
			t.Error("another one is kept from the device")
		}
		time.Sleep(unanswered)
		if repeated, _ := h.receiving(responseTo(1)); repeated {
			t.Error("kept from a device that may have had no room for it")
		}
	})
}

// A path that comes up while the device sends its initiation does not send it a second time; one that comes up after an
// initiation went nowhere does.
func TestInitiationGoesOutOnceAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h handshake
		h.sending(message(device.MessageInitiationType, device.MessageInitiationSize))
		if h.again(time.Now(), true) != nil {
			t.Error("sent twice at once")
		}
		h.unsent()
		if h.again(time.Now(), true) == nil {
			t.Error("an initiation that found no path does not go out on the first one")
		}
		if h.again(time.Now(), true) != nil {
			t.Error("sent twice at once")
		}
		time.Sleep(apart)
		if h.again(time.Now(), true) == nil {
			t.Error("a new path does not get the initiation")
		}
		time.Sleep(time.Second)
		if h.again(time.Now(), false) == nil {
			t.Error("an unanswered initiation is not sent again")
		}
	})
}

// patch writes a number into a message.
func patch(pkt []byte, at int, n uint32) []byte {
	binary.LittleEndian.PutUint32(pkt[at:], n)
	return pkt
}

func initiationFrom(sender uint32) []byte {
	return patch(message(device.MessageInitiationType, device.MessageInitiationSize), 4, sender)
}

func responseTo(receiver uint32) []byte {
	return patch(message(device.MessageResponseType, device.MessageResponseSize), 8, receiver)
}

func transportTo(receiver uint32) []byte {
	return patch(message(device.MessageTransportType, device.MessageKeepaliveSize), 4, receiver)
}

// Whoever forges the address of a validated path can send any response. It does not end the repetition of our initiation: only the
// device's use of new keys does.
func TestForgedResponseEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handshake{done: make(chan struct{})}
		h.sending(transportTo(7)) // of an older session
		<-h.done
		h.completed.Store(0)
		h.done = make(chan struct{})
		h.sending(initiationFrom(1))
		for n := range uint32(100) {
			if repeated, _ := h.receiving(responseTo(n)); repeated {
				t.Fatal("a response is kept from the device, which alone can judge it")
			}
		}
		h.sending(transportTo(7))
		time.Sleep(resendFirst)
		if h.again(time.Now(), false) == nil || h.completed.Load() != 0 {
			t.Fatal("a forged response ended the handshake")
		}
		h.sending(transportTo(8))
		time.Sleep(time.Second)
		if h.again(time.Now(), false) != nil || h.completed.Load() == 0 {
			t.Error("new keys do not end the repetition")
		}
		<-h.done
	})
}

// Nor do forged initiations make us forget what the device has answered.
func TestForgedInitiationForgetsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h handshake
		h.receiving(initiationFrom(1))
		h.sending(responseTo(1))
		for n := range uint32(1000) {
			h.receiving(initiationFrom(n + 2))
		}
		if len(h.pending) > maxPending {
			t.Errorf("%d initiations are kept", len(h.pending))
		}
		if repeated, response := h.receiving(initiationFrom(1)); !repeated || response == nil {
			t.Error("the answer to the repeated initiation is lost")
		}
		if repeated, response := h.receiving(initiationFrom(1)); !repeated || response != nil {
			t.Error("answered twice at once")
		}
		if repeated, _ := h.receiving(initiationFrom(5000)); repeated {
			t.Error("a new initiation is kept from the device")
		}
	})
}
