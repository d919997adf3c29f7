//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// replace becomes the program, which so gets every signal and gives its own exit code.
func replace(program string, argv, environ []string) error {
	return notRun(program, &fs.PathError{Op: "exec", Path: program, Err: syscall.Exec(program, argv, environ)})
}
