//go:build !linux

package proxy

import "net"

// permitted lets every local process in: this system does not say who owns a connection.
func permitted(net.Conn, []int) error { return nil }
