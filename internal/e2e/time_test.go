//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// firstByte is the time from the start of the process `culvert up` to the first byte of the private service's answer, and
// what `up` reports of it.
func firstByte(t testing.TB, s *stage.Stage, mode string) (time.Duration, ready) {
	t.Helper()
	job := newJob(t, s, stage.JobOptions{})
	began := time.Now()
	r := up(t, job, mode)
	resp, err := s.Client(s.Runner, 10*time.Second).Get("http://" + s.Target(stage.PortHTTP))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	culvert(t, job, 0, "down")
	return took, r
}

// tokenTime is what the token alone costs a runner: a new TLS connection to the issuer, one request.
func tokenTime(t testing.TB, s *stage.Stage) time.Duration {
	t.Helper()
	asks := s.Issuer.AddJob(stage.Claims(nil))
	client := s.Client(s.Runner, 10*time.Second)
	req, err := http.NewRequest(http.MethodGet, asks.RequestURL+"&audience="+wire.Audience(s.URL, newKey(t).Public()), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+asks.RequestToken)
	began := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("the issuer answers %s, %v", resp.Status, err)
	}
	return time.Since(began)
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// From the start of the process to the first byte: 150 ms without delay, and 600 ms beside the token with 20 ms one way on
// every link to the internet, which is 80 ms between any two hosts: seven round trips.
func TestTimeToFirstByte(t *testing.T) {
	for _, tc := range []struct {
		delay, limit time.Duration
		token        bool // comes on top of the limit
	}{
		{0, 150 * time.Millisecond, false},
		{20 * time.Millisecond, 600 * time.Millisecond, true},
	} {
		t.Run(fmt.Sprintf("delay-%v", tc.delay), func(t *testing.T) {
			s := setup(t, stage.Options{Link: lab.Link{Delay: tc.delay}})
			// A machine that is busy with something else for a while is not what this measures.
			const tries = 3
			for try := 1; ; try++ {
				got, token := medians(t, s)
				limit := tc.limit
				if tc.token {
					limit += token
				}
				if got <= limit {
					return
				}
				if try == tries {
					t.Fatalf("the median is %v in each of %d tries, want at most %v", got, tries, limit)
				}
			}
		})
	}
}

// medians measures ten times.
func medians(t *testing.T, s *stage.Stage) (got, token time.Duration) {
	t.Helper()
	var times, tokens []time.Duration
	var last ready
	for range 10 {
		took, r := firstByte(t, s, "tun")
		times, last = append(times, took), r
		tokens = append(tokens, tokenTime(t, s))
	}
	got, token = median(times), median(tokens)
	t.Logf("median %v (token alone %v), all %v, last run's phases %v", got, token, times, last.Timings)
	return got, token
}
