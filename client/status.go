package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/wire"
)

// statusCommand shows the tunnel.
type statusCommand struct{}

func (*statusCommand) run(ctx context.Context, env environment, flags common) error {
	names := flags.all(ctx)
	for i, name := range names {
		st, err := readStatus(ctx, name)
		switch {
		case err != nil:
			return err
		case flags.JSON:
			print(env.stdout, st)
			continue
		case i > 0:
			fmt.Fprintln(env.stdout)
		}
		if len(names) > 1 {
			fmt.Fprintf(env.stdout, "%s:\n", name)
		}
		if err := writeStatus(env.stdout, st, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

func readStatus(ctx context.Context, name string) (control.Status, error) {
	client, err := control.NewClient(name)
	if err != nil {
		return control.Status{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return client.Status(ctx)
}

// writeStatus writes a status as people read it.
func writeStatus(w io.Writer, st control.Status, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		if text := fmt.Sprintf(format, args...); text != "" {
			fmt.Fprintf(table, "%s\t%s\n", name, text)
		}
	}
	row("state", "%s", st.State)
	row("session", "%s", st.Session)
	row("network", "%s", st.Network)
	row("addresses", "%s", strings.Join(st.Addresses, ", "))
	row("gateway", "%s", st.Gateway)
	row("standby", "%s", st.Standby)
	row("path", "%s", pathText(st))
	if st.Handshake != nil {
		row("handshake", "%s ago", now.Sub(*st.Handshake).Round(time.Second))
	}
	row("traffic", "%s received, %s sent", bytesText(st.RxBytes), bytesText(st.TxBytes))
	row("mode", "%s", strings.TrimSpace(st.Mode+" "+st.Interface))
	row("proxy", "%s", st.Proxy)
	for _, r := range st.Reached {
		row(string(r.Verdict), "%s", reachedText(r))
	}
	row("rules", "%s", strings.Join(st.Rules, ", "))
	row("routes", "%s", strings.Join(st.Routes, ", "))
	row("names", "%s", strings.Join(st.Names, ", "))
	row("left out", "%s", strings.Join(st.LeftOut, ", "))
	if st.Expires != nil {
		row("lease", "%s, renewed before that", untilText(*st.Expires, now))
	}
	if st.Ends != nil {
		row("ends", "%s at the latest", untilText(*st.Ends, now))
	}
	if st.Rejoins > 0 {
		row("rejoins", "%d", st.Rejoins)
	}
	if st.Problem != nil {
		row("problem", "%s", st.Problem.Error())
	}
	for _, event := range st.History {
		row(event.At.Format(time.TimeOnly), "%s", event.What)
	}
	return table.Flush()
}

// reachedText writes what became of the flows to one target.
func reachedText(r wire.Reached) string {
	flows := "flows"
	if r.Flows == 1 {
		flows = "flow"
	}
	text := fmt.Sprintf("%s %s, %d %s", r.Proto, r.Target, r.Flows, flows)
	if r.BytesUp+r.BytesDn > 0 {
		text += fmt.Sprintf(", %s received, %s sent", bytesText(r.BytesDn), bytesText(r.BytesUp))
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return text
}

func pathText(st control.Status) string {
	if st.Path == nil {
		return "none"
	}
	text := fmt.Sprintf("%s, %.1f ms", st.Path.Words(), st.Path.RTT)
	if st.Path.Parities || st.Path.Rebuilt > 0 {
		text += fmt.Sprintf("; %.1f %% of packets get lost, %d rebuilt", 100*st.Path.Lost, st.Path.Rebuilt)
	}
	return text
}

func untilText(at, now time.Time) string {
	return fmt.Sprintf("%s (in %s)", at.Format(time.TimeOnly), at.Sub(now).Round(time.Second))
}

// bytesText writes a number of bytes with a unit of powers of 1000.
func bytesText(n uint64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1000, 0
	for value >= 999.95 && unit < len(units)-1 {
		value /= 1000
		unit++
	}
	return fmt.Sprintf("%.1f %cB", value, units[unit])
}
