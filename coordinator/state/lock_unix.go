//go:build unix

package state

import (
	"os"
	"syscall"
)

// lockFile takes the file for this process; the system gives it up when the process dies, however it does.
func lockFile(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) //nolint:gosec // a descriptor fits an int
}
