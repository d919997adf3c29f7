//go:build unix && !linux

package control

import (
	"os"
	"syscall"
)

func ownedAndPrivate(info os.FileInfo, uid int) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == uid && info.Mode().Perm()&0o077 == 0
}
