//go:build unix

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

// screen prints steps as they end: a mark, what was shown, how long it took, and details below.
type screen struct {
	out            io.Writer
	colour         bool
	passed, failed int
}

// width of a step's line up to its time, in characters.
const width = 66

// SGR codes (ECMA-48).
const (
	bold  = "1"
	faint = "2"
	green = "32"
	red   = "31"
)

func newScreen(out *os.File) *screen {
	info, err := out.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	return &screen{out: out, colour: terminal && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s *screen) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s *screen) line(text string) { fmt.Fprintln(s.out, strings.TrimRight("  "+text, " ")) }

func (s *screen) title(text string) {
	s.line("")
	s.line(s.paint(bold, text))
	s.line("")
}

// step runs one step and prints how it went. It reports whether the step held.
func (s *screen) step(what string, show func() ([]string, error)) bool {
	began := time.Now()
	details, err := show()
	took := time.Since(began)
	mark := s.paint(green, "✓")
	if err != nil {
		mark = s.paint(red, "✗")
		details = append(details, strings.Split(err.Error(), "\n")...)
		s.failed++
	} else {
		s.passed++
	}
	pad := strings.Repeat(" ", max(1, width-utf8.RuneCountInString(what)))
	s.line(fmt.Sprintf("%s %s%s%s", mark, what, pad, s.paint(faint, fmt.Sprintf("%6d ms", took.Milliseconds()))))
	for _, d := range details {
		s.line("    " + s.paint(faint, d))
	}
	return err == nil
}

// cannot says what is not shown here, and why.
func (s *screen) cannot(what, why string) {
	s.line(fmt.Sprintf("– %s: not shown here", what))
	s.line("    " + s.paint(faint, why))
}

// summary prints the last line and gives how many steps failed.
func (s *screen) summary() int {
	s.line("")
	code := green
	if s.failed > 0 {
		code = red
	}
	fmt.Fprintln(s.out, s.paint(code, fmt.Sprintf("demo: %d passed, %d failed", s.passed, s.failed)))
	return s.failed
}
