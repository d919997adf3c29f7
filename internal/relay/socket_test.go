package relay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"testing"
)

// piped is a connection that has said all it will.
type piped struct{ *bytes.Reader }

func (piped) Write(b []byte) (int, error) { return len(b), nil }
func (piped) Close() error                { return nil }

// reader is a server's end that reads these bytes and then the end.
func reader(t *testing.T, b []byte) *socket {
	t.Helper()
	conn := piped{bytes.NewReader(b)}
	s := newSocket(conn, bufio.NewReaderSize(conn, acceptBuffer), false)
	t.Cleanup(func() { _ = s.close() })
	return s
}

// frameOf is a frame of a client's, masked with zeros: its header says size, whatever of the payload follows.
func frameOf(op byte, fin bool, size int, payload []byte) []byte {
	b := []byte{op, maskBit | 127}
	if fin {
		b[0] |= finBit
	}
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	return append(append(b, 0, 0, 0, 0), payload...)
}

// TestAnnouncedBytesTakeNoMemory: a relay keeps room for what has come of a message, not for what a stranger says will come.
func TestAnnouncedBytesTakeNoMemory(t *testing.T) {
	for _, come := range []int{0, 1, 3000, 20_000} {
		buf, err := reader(t, frameOf(opBinary, true, MaxMessage, make([]byte, come))).readMessage(nil)
		if err == nil {
			t.Fatal("a message that was cut is taken")
		}
		if cap(buf) > max(4*come, 8<<10) {
			t.Errorf("%d bytes have come, %d are kept for them", come, cap(buf))
		}
	}
}

// TestMessagesGrow: a message arrives whole, whatever its size and in however many parts, also in a buffer that was used before.
func TestMessagesGrow(t *testing.T) {
	var buf []byte
	for _, size := range []int{1, firstRead - 1, firstRead, firstRead + 1, 5000, 70_000, 100, MaxMessage} {
		payload := bytes.Repeat([]byte("0123456"), size/7+1)[:size]
		for _, cut := range []int{0, 1, size / 2, size} {
			in := append(frameOf(opBinary, false, cut, payload[:cut]), frameOf(opContinuation, true, size-cut, payload[cut:])...)
			got, err := reader(t, in).readMessage(buf)
			if err != nil || !bytes.Equal(got, payload) {
				t.Fatalf("%d bytes, cut at %d: %d bytes, %v", size, cut, len(got), err)
			}
			buf = got
		}
	}
	if _, err := reader(t, append(frameOf(opBinary, false, 1, []byte{1}), frameOf(opContinuation, true, MaxMessage, make([]byte, MaxMessage))...)).readMessage(nil); err == nil {
		t.Error("a message of a byte too many is taken")
	}
}
