package problem

import (
	"log/slog"
	"time"
)

// LogAttr is a [slog.HandlerOptions.ReplaceAttr] for logs that people read: without it a JSON log counts durations in
// nanoseconds, and writes an error now as text and now as the document that it is on the wire.
func LogAttr(_ []string, a slog.Attr) slog.Attr {
	switch v := a.Value.Any().(type) {
	case time.Duration:
		if v >= time.Second {
			v = v.Round(time.Millisecond)
		}
		a.Value = slog.StringValue(v.String())
	case error:
		a.Value = slog.StringValue(v.Error())
	}
	return a
}
