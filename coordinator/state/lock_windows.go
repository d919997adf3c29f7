package state

import (
	"os"

	"golang.org/x/sys/windows"
)

// lockFile takes the file for this process; the system gives it up when the process dies, however it does.
func lockFile(f *os.File) error {
	const flags = windows.LOCKFILE_EXCLUSIVE_LOCK | windows.LOCKFILE_FAIL_IMMEDIATELY
	return windows.LockFileEx(windows.Handle(f.Fd()), flags, 0, 1, 0, &windows.Overlapped{})
}
