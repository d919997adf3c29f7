package requirements

import (
	"fmt"
	"strings"
)

// Markdown writes a party's rows as a table.
func Markdown(p Party) string {
	var b strings.Builder
	b.WriteString("| | with | protocol, port | carries | what for | when |\n|---|---|---|---|---|---|\n")
	for _, r := range For(p) {
		when := r.When
		if r.Required {
			when = "**" + r.When + "**"
		}
		fmt.Fprintf(&b, "| %s | %s | %s %s | %s | %s | %s |\n", r.Direction, r.Peer, r.Protocol, r.Port, r.Carries, r.Purpose, when)
	}
	return b.String()
}
