//go:build unix

package main

import (
	"os"
	"syscall"
)

// detached gives the child a session of its own, so that no terminal and no process group takes it along (setsid(2)).
func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// letGo closes the three standard streams, so that nobody waits for their end, by putting /dev/null in their place.
func letGo() {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer null.Close()
	for fd := range 3 {
		_ = dup(int(null.Fd()), fd)
	}
}
