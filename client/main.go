// Command culvert gives a CI job a private path to internal services for as long as it runs.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	started := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	env := environment{
		args:    os.Args[1:],
		getenv:  os.Getenv,
		stdin:   os.Stdin,
		stdout:  os.Stdout,
		stderr:  os.Stderr,
		started: started,
	}
	env.inherit()
	code := run(ctx, env)
	stop()
	os.Exit(code)
}
