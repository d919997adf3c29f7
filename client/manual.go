package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/alecthomas/kong"
)

// manCommand prints the manual page, from the same source as --help.
type manCommand struct{}

func (*manCommand) run(_ context.Context, env environment, _ common) error {
	var cli commands
	parser, err := newParser(&cli, env, func(int) {})
	if err != nil {
		return err
	}
	writeManual(env.stdout, parser.Model)
	return nil
}

// roff keeps text from being markup of man(7).
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "`", "").Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}

func writeManual(w io.Writer, app *kong.Application) {
	fmt.Fprintf(w, ".TH CULVERT 1\n.SH NAME\nculvert \\- a private path for a CI job\n.SH SYNOPSIS\n.B culvert\n.I COMMAND\n[FLAGS]\n.SH DESCRIPTION\n")
	for paragraph := range strings.SplitSeq(app.Help, "\n\n") {
		fmt.Fprintf(w, "%s\n.PP\n", roff(paragraph))
	}
	fmt.Fprintf(w, ".SH EVERY COMMAND\n")
	writeFlags(w, app.Flags)
	for _, cmd := range app.Children {
		fmt.Fprintf(w, ".SH culvert %s\n%s\n", roff(strings.TrimPrefix(cmd.Summary(), "culvert ")), roff(cmd.Help))
		for _, arg := range cmd.Positional {
			fmt.Fprintf(w, ".TP\n.I %s\n%s\n", roff(arg.Name), roff(arg.Help))
		}
		writeFlags(w, cmd.Flags)
	}
}

func writeFlags(w io.Writer, flags []*kong.Flag) {
	for _, f := range flags {
		if f.Hidden {
			continue
		}
		fmt.Fprintf(w, ".TP\n.B %s\n%s\n", roff(f.String()), roff(f.Help))
		if len(f.Envs) > 0 && f.Envs[0] != "" {
			fmt.Fprintf(w, "(%s)\n", roff(strings.Join(f.Envs, ", ")))
		}
	}
}
