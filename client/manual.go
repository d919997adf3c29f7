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

// completionCommand prints what bash needs to complete command lines.
type completionCommand struct{}

func (*completionCommand) run(_ context.Context, env environment, _ common) error {
	var cli commands
	parser, err := newParser(&cli, env, func(int) {})
	if err != nil {
		return err
	}
	writeCompletion(env.stdout, parser.Model)
	return nil
}

// writeCompletion writes a function for bash: commands first, then the flags of the command, and of flags with a choice the choices.
func writeCompletion(w io.Writer, app *kong.Application) {
	names := func(flags []*kong.Flag) (list []string) {
		for _, f := range flags {
			if !f.Hidden {
				list = append(list, "--"+f.Name)
			}
		}
		return list
	}
	var all, cases, choices []string
	for _, cmd := range app.Children {
		all = append(all, cmd.Name)
		cases = append(cases, fmt.Sprintf("    %s) words=%q ;;", cmd.Name, strings.Join(append(names(app.Flags), names(cmd.Flags)...), " ")))
		for _, f := range cmd.Flags {
			if f.Enum != "" {
				choices = append(choices, fmt.Sprintf("    --%s) words=%q ;;", f.Name, strings.ReplaceAll(f.Enum, ",", " ")))
			}
		}
	}
	fmt.Fprintf(w, `# bash completion for culvert: source <(culvert completion)
_culvert() {
  local words=""
  case "${COMP_WORDS[1]}" in
%s
  esac
  case "${COMP_WORDS[COMP_CWORD-1]}" in
%s
  esac
  [ "$COMP_CWORD" -gt 1 ] || words=%q
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _culvert culvert
`, strings.Join(cases, "\n"), strings.Join(choices, "\n"), strings.Join(all, " "))
}
