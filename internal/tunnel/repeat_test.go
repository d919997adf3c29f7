package tunnel

import (
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
