//go:build !linux

package relay

import "net"

func limitUnsent(*net.TCPConn) {}

func acknowledger(*net.TCPConn) func() { return func() {} }
