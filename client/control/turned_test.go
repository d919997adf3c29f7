package control

import (
	"errors"
	"io"
	"net"
	"net/url"
	"syscall"
	"testing"
)

// A server that closes at once shows in several ways, depending on how far the request has got.
func TestHowBeingTurnedAwayShows(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{io.EOF, true},
		{errors.New("http: server closed idle connection"), true},
		{&net.OpError{Op: "write", Err: syscall.EPIPE}, true},
		{&net.OpError{Op: "read", Err: syscall.ECONNRESET}, true},
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, false},
	} {
		if got := turnedAway(&url.Error{Op: "Get", URL: "http://culvert", Err: c.err}); got != c.want {
			t.Errorf("%v: turned away is %v", c.err, got)
		}
	}
}
