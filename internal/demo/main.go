//go:build unix

// Command demo shows Culvert's main job on one machine: a CI job proves who it is and reaches one private service, and
// nothing else. It needs Go and no root. Where the kernel gives this user network namespaces, the job, the internet and
// the private network are really apart; where it does not, the demo says what it cannot show.
//
//	go run ./internal/demo [-bin DIR] [-flat]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// patience bounds the whole demo once everything is built.
const patience = 2 * time.Minute

// binEnv tells the process that lab.Enter starts where the programs are.
const binEnv = "CULVERT_DEMO_BIN"

func main() {
	bin := flag.String("bin", os.Getenv(binEnv), "folder with the three programs; default: build them")
	flat := flag.Bool("flat", false, "use no network namespaces, as where the kernel gives none")
	fetch := flag.String("fetch", "", "fetch this URL as a program of the job would, and end")
	flag.Parse()
	var err error
	if *fetch != "" {
		err = fetchURL(*fetch)
	} else {
		err = run(*bin, *flat)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

var errFailed = errors.New("not everything that it shows is true")

func run(bin string, flat bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := scratch()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if bin == "" {
		if err := stage.Build(ctx, ".", dir); err != nil {
			return err
		}
		bin = dir
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	// The process that Enter may start finds them there; this one then only passes on how that ended.
	os.Setenv(binEnv, bin)
	apart := errors.New("-flat was given")
	if !flat {
		apart = enter(dir)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d := &demo{screen: newScreen(os.Stdout), bin: bin, dir: dir}
	if err := d.play(ctx, apart); err != nil {
		return err
	}
	if failed := d.screen.summary(); failed > 0 {
		return errFailed
	}
	return nil
}

// enter gets this process network namespaces, or says why it has none. Where that takes another process, this
// one ends there, so what would be deferred is done before.
func enter(dir string) error {
	if lab.Available() == nil {
		return nil
	}
	return lab.EnterThen(func() { os.RemoveAll(dir) })
}

func scratch() (string, error) {
	dir, err := os.MkdirTemp("", "culvert-demo-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755) // the gateway runs as another user and reads its files here
}
