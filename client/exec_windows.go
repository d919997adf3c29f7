package main

import (
	"errors"
	"os"
	"os/exec"
)

// replace runs the program and gives its exit code. The console sends both of us Ctrl-C; we wait for the program.
func replace(program string, argv, environ []string) error {
	cmd := exec.Command(program, argv[1:]...)
	cmd.Env = environ
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var status *exec.ExitError
	switch {
	case errors.As(err, &status):
		return exit(status.ExitCode())
	case err != nil:
		return notRun(program, err)
	default:
		return nil
	}
}
