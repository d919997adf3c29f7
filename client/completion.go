package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/alecthomas/kong"
)

// completionCommand prints what a shell needs to complete command lines, from the same source as --help.
type completionCommand struct {
	Shell string `arg:"" optional:"" default:"bash" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

func (c *completionCommand) run(_ context.Context, env environment, _ common) error {
	var cli commands
	parser, err := newParser(&cli, env, func(int) {})
	if err != nil {
		return err
	}
	shells := map[string]func(io.Writer, *kong.Application){"bash": completeBash, "zsh": completeZsh, "fish": completeFish}
	shells[c.Shell](env.stdout, parser.Model)
	return nil
}

// completed are the flags that a command shows, its own and everybody's.
func completed(app *kong.Application, cmd *kong.Node) (list []*kong.Flag) {
	for _, f := range append(append([]*kong.Flag{}, app.Flags...), cmd.Flags...) {
		if !f.Hidden {
			list = append(list, f)
		}
	}
	return list
}

// cases writes what a case statement needs: for each command its flags, and for each flag with a choice the choices.
func cases(app *kong.Application, format string) (commands, flags, choices []string) {
	for _, cmd := range app.Children {
		commands = append(commands, cmd.Name)
		var names []string
		for _, f := range completed(app, cmd) {
			names = append(names, "--"+f.Name)
			if f.Enum != "" {
				choice := fmt.Sprintf(format, "--"+f.Name, strings.ReplaceAll(f.Enum, ",", " "))
				choices = append(choices, choice)
			}
		}
		flags = append(flags, fmt.Sprintf(format, cmd.Name, strings.Join(names, " ")))
	}
	return commands, flags, choices
}

// completeBash writes a function for bash: commands first, then the flags of the command, and of flags with a choice the choices.
func completeBash(w io.Writer, app *kong.Application) {
	commands, flags, choices := cases(app, "    %s) words=%q ;;")
	fmt.Fprintf(w, `# bash completion for culvert: source <(culvert completion bash)
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
`, strings.Join(flags, "\n"), strings.Join(choices, "\n"), strings.Join(commands, " "))
}

// completeZsh writes the same for zsh.
func completeZsh(w io.Writer, app *kong.Application) {
	commands, flags, choices := cases(app, "    %s) offered=(%s) ;;")
	fmt.Fprintf(w, `#compdef culvert
# zsh completion for culvert: source <(culvert completion zsh)
_culvert() {
  local -a offered
  case "${words[2]}" in
%s
  esac
  case "${words[CURRENT-1]}" in
%s
  esac
  (( CURRENT > 2 )) || offered=(%s)
  compadd -- $offered || _files
}
compdef _culvert culvert
`, strings.Join(flags, "\n"), strings.Join(choices, "\n"), strings.Join(commands, " "))
}

// completeFish writes one line for each command and each flag, with what it is for.
func completeFish(w io.Writer, app *kong.Application) {
	fmt.Fprintln(w, "# fish completion for culvert: culvert completion fish | source")
	for _, cmd := range app.Children {
		fmt.Fprintf(w, "complete -c culvert -n __fish_use_subcommand -f -a %s -d %s\n", cmd.Name, fishWord(cmd.Help))
	}
	for _, cmd := range app.Children {
		for _, f := range completed(app, cmd) {
			value := ""
			switch {
			case f.Enum != "":
				value = " -x -a " + fishWord(strings.ReplaceAll(f.Enum, ",", " "))
			case !f.IsBool():
				value = " -r"
			}
			fmt.Fprintf(w, "complete -c culvert -n '__fish_seen_subcommand_from %s' -l %s%s -d %s\n", cmd.Name, f.Name, value, fishWord(f.Help))
		}
	}
}

// fishWord quotes text for fish.
func fishWord(text string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`, "\n", " ").Replace(text) + "'"
}
