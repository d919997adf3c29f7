package main

import (
	"os"
	"syscall"

	"golang.org/x/sys/windows"
)

// detached gives the child no console and a process group of its own.
func detached() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{CreationFlags: windows.DETACHED_PROCESS | windows.CREATE_NEW_PROCESS_GROUP}
}

// letGo closes the three standard streams, so that nobody waits for their end.
func letGo() {
	for _, file := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		_ = file.Close()
	}
}
