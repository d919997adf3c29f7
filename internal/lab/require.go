package lab

import "os"

// TB is what [Require] needs of a testing.TB.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Require skips a test where no lab can be built, and names the reason. With CI=true nothing may be skipped: it fails.
func Require(tb TB) {
	tb.Helper()
	if err := Available(); err != nil {
		Skip(tb, "no network lab: %v", err)
	}
}

// Skip skips a test for want of what the machine does not have. With CI=true it fails, so that nothing is left out unseen.
func Skip(tb TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CI") == "true" {
		tb.Fatalf(format+"; with CI=true nothing may be skipped", args...)
	}
	tb.Skipf(format, args...)
}
