package problem_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestLogsAreForPeople(t *testing.T) {
	var buf bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&buf, &slog.HandlerOptions{ReplaceAttr: problem.LogAttr}))
	var none error
	log.Error("m", "err", problem.New(problem.Denied, "no", "ask"), "cause", errors.New("plain"), "none", none,
		"retry", 33198278130*time.Nanosecond, "rtt", 250*time.Microsecond, "n", 3)
	want := `"err":"denied: no; ask","cause":"plain","none":null,"retry":"33.198s","rtt":"250µs","n":3}`
	if got := strings.TrimSpace(buf.String()); !strings.HasSuffix(got, want) {
		t.Errorf("%s\nwant …%s", got, want)
	}
}
