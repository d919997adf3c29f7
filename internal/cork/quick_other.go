//go:build !linux

package cork

import "net"

// Acknowledger gives a function that does nothing.
func Acknowledger(*net.TCPConn) func() { return func() {} }
