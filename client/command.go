package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
)

// environment is what a command has of the process around it.
type environment struct {
	args    []string // without the program's name
	getenv  func(string) string
	stdin   *os.File
	stdout  io.Writer
	stderr  io.Writer
	started time.Time // when the command began, in the process that the user started
	// launched says that another process started this one to run the tunnel in the background; see launch.go.
	launched bool
}

// common are the flags of every command.
type common struct {
	JSON bool   `name:"json" env:"CULVERT_JSON" help:"Print JSON on standard output: the result, or a problem document (RFC 9457)."`
	Name string `env:"CULVERT_NAME" help:"Name of the tunnel, where a user runs several. All commands but up take several names, separated by commas. Without it up and down are about the one called culvert, and check, exec and status about all of this user's."`
}

// usualName is the tunnel's that nobody has named.
const usualName = "culvert"

// name is the tunnel that up is about.
func (c common) name() string { return cmp.Or(c.Name, usualName) }

// names are the tunnels that a command is about which changes them.
func (c common) names() []string { return strings.Split(c.name(), ",") }

// all are the tunnels that a command is about which only asks: those that were named, or else all that answer this user.
func (c common) all(ctx context.Context) []string {
	var names []string
	if c.Name == "" {
		for _, claim := range control.Tunnels(ctx, "") {
			names = append(names, claim.Name)
		}
	}
	if len(names) == 0 {
		return c.names()
	}
	return names
}

// commands is the command line.
type commands struct {
	common

	Up       upCommand       `cmd:"" help:"Join a network and return when it is usable."`
	Down     downCommand     `cmd:"" help:"End the tunnel and wait until it is gone."`
	Status   statusCommand   `cmd:"" help:"Show the tunnel: its path, addresses, routes and lease."`
	Exec     execCommand     `cmd:"" help:"Run a program with its traffic going through the tunnel."`
	Netcheck netcheckCommand `cmd:"" help:"Say what the network here is, and what that means for a tunnel. Needs no tunnel."`
	Doctor   doctorCommand   `cmd:"" help:"Test every name and port that a runner needs, and print the table for a firewall team. Needs no tunnel."`
	Check    checkCommand    `cmd:"" help:"Ask the gateway whether targets can be reached, and why not."`
	Version  versionCommand  `cmd:"" help:"Show this program's version."`

	Man        manCommand        `cmd:"" help:"Print the manual page."`
	Completion completionCommand `cmd:"" help:"Print completion for a shell: source <(culvert completion bash)."`
}

// newParser makes what reads command lines, and what --help and the manual page are made from.
func newParser(cli *commands, env environment, exit func(int)) (*kong.Kong, error) {
	return kong.New(cli,
		kong.Name("culvert"),
		kong.Description("Culvert gives a CI job a private path to internal services for as long as it runs.\n\n"+
			"Exit codes: 0 done, 1 failed, 2 usage, 3 denied by policy, 4 timed out."),
		kong.UsageOnError(),
		kong.Writers(env.stdout, env.stderr),
		kong.Exit(exit),
	)
}

// command is what every command's struct does.
type command interface {
	run(ctx context.Context, env environment, flags common) error
}

// exit is an error that carries nothing but an exit code: what there was to say has been printed.
type exit int

// Error names the code; nobody prints it.
func (e exit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// withExit is an error that has an exit code other than its problem's.
type withExit struct {
	error
	code int
}

// Unwrap gives the problem.
func (e withExit) Unwrap() error { return e.error }

// run runs one command line and gives the exit code.
func run(ctx context.Context, env environment) int {
	var cli commands
	var helped *int
	parser, err := newParser(&cli, env, func(code int) { helped = &code })
	if err != nil {
		return report(env, false, err)
	}
	parsed, err := parser.Parse(env.args)
	if helped != nil {
		return *helped
	}
	if err != nil {
		return report(env, cli.JSON || asksJSON(env.args), problem.Wrap(err, problem.Usage, err.Error(), "see `culvert --help`, and `culvert COMMAND --help`"))
	}
	cmd, ok := parsed.Selected().Target.Addr().Interface().(command)
	if !ok {
		return report(env, cli.JSON, fmt.Errorf("command %q does nothing", parsed.Command()))
	}
	return report(env, cli.JSON, cmd.run(ctx, env, cli.common))
}

// asksJSON finds --json in a command line that did not parse.
func asksJSON(args []string) bool {
	for _, arg := range args {
		if arg == "--json" {
			return true
		}
		if arg == "--" {
			break
		}
	}
	return false
}

// report tells of an error and gives the exit code: for people on standard error, with --json as a problem document on
// standard output, and in GitHub Actions as an annotation too.
func report(env environment, asJSON bool, err error) int {
	if err == nil {
		return problem.ExitDone
	}
	if code, ok := err.(exit); ok {
		return int(code)
	}
	p := problem.From(err)
	if asJSON {
		print(env.stdout, p)
	} else {
		fmt.Fprint(env.stderr, human(p))
	}
	if env.getenv("GITHUB_ACTIONS") == "true" && !env.launched {
		fmt.Fprint(env.stderr, annotation(p))
	}
	if e, ok := errors.AsType[withExit](err); ok {
		return e.code
	}
	return p.Code.Exit()
}

// human writes an error as people read it: what happened, then what to do.
func human(p *problem.Error) string {
	var b strings.Builder
	fmt.Fprintf(&b, "culvert: %s [%s]\n", p.Message, p.Code)
	if d := p.Denial; d != nil && d.Rule != "" {
		got := "the token has no such claim"
		if d.Got != "" {
			got = fmt.Sprintf("got %q", d.Got)
		}
		fmt.Fprintf(&b, "  closest rule %q: claim %s expected %q, %s\n", d.Rule, d.Claim, d.Expected, got)
	}
	if p.Code == problem.Failed && p.Err != nil && !strings.Contains(p.Message, p.Err.Error()) {
		fmt.Fprintf(&b, "  cause: %v\n", p.Err)
	}
	if p.Next != "" {
		fmt.Fprintf(&b, "  next: %s\n", strings.ReplaceAll(p.Next, "\n", "\n    "))
	}
	return b.String()
}

// annotation writes an error as a workflow command, escaped as GitHub's toolkit does (packages/core/src/command.ts), so
// that no text of a server can start a command of its own.
func annotation(p *problem.Error) string {
	data := strings.NewReplacer("%", "%25", "\r", "%0D", "\n", "%0A")
	property := strings.NewReplacer("%", "%25", "\r", "%0D", "\n", "%0A", ":", "%3A", ",", "%2C")
	return fmt.Sprintf("::error title=%s::%s\n", property.Replace("culvert: "+string(p.Code)), data.Replace(human(p)))
}

// print writes a value as one line of JSON.
func print(w io.Writer, v any) {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(v) // standard output is closed; nobody reads
}
