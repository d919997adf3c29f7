package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/lab"
)

// completions are what is offered after a line, in every shell.
var completions = map[string]string{
	"culvert stat":                "status",
	"culvert up --wait":           "--wait-for",
	"culvert up --for":            "--foreground --forward",
	"culvert up --mode t":         "tun",
	"culvert down --wait":         "",
	"culvert check --js":          "--json",
	"culvert up --mode auto --ne": "--network",
}

// What each shell completes, asked of the shell itself. Only bash has to be there.
func TestCompletion(t *testing.T) {
	for shell, script := range map[string]string{
		"bash": `. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _culvert; echo "${COMPREPLY[*]}"`,
		// zsh's own functions do not run outside its line editor; what is given to them is what is offered.
		"zsh": `compdef() {}; compadd() { shift; for w in "$@"; do [[ $w == ${words[CURRENT]}* ]] && print -n -- "$w "; done; return 0 }
			file=$1; shift; source $file; words=("$@"); CURRENT=$#; _culvert`,
		"fish": `source $argv[1]; complete -C (string join -- " " $argv[2..-1]); true`,
	} {
		path, err := exec.LookPath(shell)
		if err != nil {
			if shell == "bash" {
				lab.Skip(t, "there is no bash here")
			}
			continue
		}
		file := filepath.Join(t.TempDir(), "culvert")
		if err := os.WriteFile(file, []byte(printed(t, "completion", shell)), 0o600); err != nil {
			t.Fatal(err)
		}
		for line, want := range completions {
			args := []string{"-c", script}
			if shell != "fish" {
				args = append(args, shell) // $0
			}
			cmd := exec.Command(path, append(append(args, file), strings.Fields(line)...)...)
			cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
			out, err := cmd.CombinedOutput()
			var got []string
			for line := range strings.Lines(string(out)) {
				offered, _, _ := strings.Cut(line, "\t") // fish says what it is for
				got = append(got, strings.Fields(offered)...)
			}
			if err != nil || !slices.Equal(got, strings.Fields(want)) {
				t.Errorf("%s, %s: %q, %v; want %q", shell, line, got, err, want)
			}
		}
	}
}

// Each shell is told of every flag of `up`, and another shell is refused.
func TestCompletionIsWhole(t *testing.T) {
	if bash := printed(t, "completion"); bash != printed(t, "completion", "bash") {
		t.Error("bash is not what is printed without a word")
	}
	for shell, as := range map[string]string{"bash": "--", "zsh": "--", "fish": "-l "} {
		text := printed(t, "completion", shell)
		for field := range reflect.TypeFor[upCommand]().Fields() {
			if name := field.Tag.Get("name"); name != "" && !strings.Contains(text, as+name) {
				t.Errorf("%s is not told of --%s", shell, name)
			}
		}
	}
	env := environment{args: []string{"completion", "tcsh"}, getenv: func(string) string { return "" }, stdout: os.Stderr, stderr: os.Stderr}
	if code := run(t.Context(), env); code != 2 {
		t.Errorf("for tcsh: exit %d", code)
	}
}
