package problem

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestErrorsAreDocumented: docs/errors.md lists every code with the facts that hold for it, and no others.
func TestErrorsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	again := map[bool]string{true: "yes", false: "no"}
	for code := range table {
		row := fmt.Sprintf("| `%s` | %d | %d | %s | ", code, code.Status(), code.Exit(), again[code.Temporary()])
		if !strings.Contains(string(page), row) {
			t.Errorf("docs/errors.md lacks %q", row)
		}
	}
	if n := strings.Count(string(page), "\n| `"); n != len(table) {
		t.Errorf("docs/errors.md lists %d codes, there are %d", n, len(table))
	}
}
