//go:build unix

package main

import (
	"fmt"
	"syscall"

	"github.com/culvertnet/culvert/internal/problem"
)

// replace becomes the program, which so gets every signal and gives its own exit code.
func replace(program string, argv, environ []string) error {
	err := syscall.Exec(program, argv, environ)
	return problem.Wrap(err, problem.Failed, fmt.Sprintf("%s cannot be run: %v", program, err), "check that it is a program")
}
