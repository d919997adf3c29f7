//go:build !linux

package nat

// openSource polls: what other systems tell of changes differs, and a client there lives no longer than a job.
func openSource(opts WatchOptions) (source, error) { return newPoller(opts), nil }
