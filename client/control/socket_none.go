//go:build !linux && !darwin

package control

import (
	"net"
	"os"
)

// peerUID trusts the folder: this system does not tell who is at the other end of a local socket.
func peerUID(net.Conn) (int, error) { return os.Geteuid(), nil }
