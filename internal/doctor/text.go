package doctor

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/culvertnet/culvert/internal/requirements"
)

// WriteText writes the table as people and firewall teams read it: a line for each name and port.
func (r *Report) WriteText(w io.Writer) error {
	fmt.Fprintf(w, "What a %s needs from the network, and what was found from here. HTTPS goes %s.\n\n", r.Party, through(r.Proxy))
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "STATUS\tDIRECTION\tWITH\tADDRESS\tPORT\tCARRIES\tWHAT FOR\tWHEN\tFOUND")
	for _, row := range r.Rows {
		for _, line := range row.lines() {
			fmt.Fprintln(t, strings.Join(line, "\t"))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n", r.summary())
	return err
}

func through(proxy string) string {
	if proxy == "" {
		return "straight"
	}
	return "through the proxy " + proxy
}

func (r *Row) lines() (out [][]string) {
	about := []string{r.Carries, r.Purpose, r.When}
	if len(r.Checks) == 0 {
		line := append([]string{string(Untested), string(r.Direction), r.With, "-", r.Protocol + " " + r.Port}, about...)
		return [][]string{append(line, "-")}
	}
	for _, c := range r.Checks {
		status, addresses := OK, make([]string, len(c.Addresses))
		if !c.OK {
			status = Failed
		}
		for i, a := range c.Addresses {
			addresses[i] = a.String()
		}
		if len(addresses) == 0 {
			addresses = []string{"-"}
		}
		at := r.Protocol + " " + r.Port
		if c.Port != 0 {
			at = fmt.Sprintf("%s %d", r.Protocol, c.Port)
		}
		found := c.Found
		if c.RTT > 0 {
			found += fmt.Sprintf(", %.1f ms", c.RTT)
		}
		line := append([]string{string(status), string(r.Direction), c.Host, strings.Join(addresses, " "), at}, about...)
		out = append(out, append(line, found))
	}
	return out
}

// summary says what the failures come to, and what nobody could tell from here though it is always required.
func (r *Report) summary() string {
	var required, other, unknown []string
	for _, row := range r.Rows {
		switch {
		case row.Status == Untested && row.Required && row.When == requirements.Always:
			unknown = append(unknown, row.ID)
		case row.Status != Failed:
		case row.Required:
			required = append(required, row.ID)
		default:
			other = append(other, row.ID)
		}
	}
	var said []string
	switch {
	case len(required) > 0:
		said = append(said, listed("Without this nothing works: %s.", required), listed("This does not work either, and is worth having: %s.", other))
	case len(other) > 0 && len(unknown) > 0:
		said = append(said, listed("This does not work, and is worth having: %s.", other))
	case len(other) > 0:
		said = append(said, listed("Everything that is required works. What does not, and is worth having: %s.", other))
	default:
		said = append(said, "Everything that could be tested works.")
	}
	said = append(said, listed("This is required, and could not be tested from here: %s.", unknown))
	return strings.Join(slices.DeleteFunc(said, func(s string) bool { return s == "" }), "\n")
}

// listed puts the ids into a sentence; without any there is none.
func listed(sentence string, ids []string) string {
	if len(ids) == 0 {
		return ""
	}
	return fmt.Sprintf(sentence, strings.Join(ids, ", "))
}
