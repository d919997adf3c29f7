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
	err := Available()
	if err == nil {
		return
	}
	if os.Getenv("CI") == "true" {
		tb.Fatalf("no network lab, and CI must not skip: %v", err)
	}
	tb.Skipf("no network lab: %v", err)
}
