package main

import (
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestReachedText(t *testing.T) {
	for want, r := range map[string]wire.Reached{
		"tcp db.internal:5432, 1 flow":                                                        {Proto: "tcp", Target: "db.internal:5432", Flows: 1},
		"tcp db.internal:5432, 2 flows: connection refused":                                   {Proto: "tcp", Target: "db.internal:5432", Flows: 2, Reason: "connection refused"},
		"udp 10.20.0.53:53, 1 flow, " + bytesText(9) + " received, " + bytesText(7) + " sent": {Proto: "udp", Target: "10.20.0.53:53", Flows: 1, BytesUp: 7, BytesDn: 9},
	} {
		if got := reachedText(r); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
