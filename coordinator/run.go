package main

import (
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"github.com/culvertnet/culvert/internal/problem"
)

// run parses the command line, runs the command and gives the exit code.
func run() int {
	parser := kong.Must(&cli{}, kong.Name("culvert-coordinator"), kong.DefaultEnvars("CULVERT"),
		kong.Description("Brings CI jobs and private networks together, by who the job is."))
	ctx, err := parser.Parse(os.Args[1:])
	if err != nil {
		err = problem.Wrap(err, problem.Usage, err.Error(), "see culvert-coordinator --help")
	} else if err = ctx.Run(); err == nil {
		return problem.ExitDone
	}
	fmt.Fprintln(os.Stderr, "culvert-coordinator:", err)
	return problem.CodeOf(err).Exit()
}
