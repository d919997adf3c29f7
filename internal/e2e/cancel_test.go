//go:build linux

package e2e

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/stage"
)

// hanging counts who comes to servers that never answer.
type hanging struct{ token, tls, request atomic.Int64 }

// The ports on the issuer's host where nobody answers.
const (
	portToken   = 8441
	portTLS     = 8442
	portRequest = 8443
)

func newHanging(t *testing.T, s *stage.Stage) *hanging {
	t.Helper()
	h := &hanging{}
	hang := func(count *atomic.Int64) http.Handler {
		return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			count.Add(1)
			<-r.Context().Done()
		})
	}
	must(t, s.Serve(s.IssuerHost, portToken, nil, hang(&h.token)))
	must(t, s.Serve(s.IssuerHost, portRequest, s.Authority(), hang(&h.request)))
	l, err := s.IssuerHost.Listen(netip.AddrPortFrom(s.IssuerHost.Addr(), portTLS).String())
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			h.tls.Add(1)
			defer conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return h
}

// Whatever a join waits for, SIGINT and SIGTERM end it and leave the host as it was. How long it takes on a quiet machine is in the docs.
func TestCancelAtEachPhase(t *testing.T) {
	s := setup(t, stage.Options{Rules: func(s *stage.Stage) string {
		return fmt.Sprintf("- {name: all, network: corp, match: {repository_owner_id: %q}, allow: [\"tcp %s\", \"tcp %s\"]}\n",
			stage.OwnerID, s.Target(stage.PortHTTP), s.Target(stage.PortOther+1))
	}})
	h := newHanging(t, s)
	at := func(scheme string, port int) string {
		return fmt.Sprintf("%s://%s:%d", scheme, s.IssuerHost.Addr(), port)
	}
	logged := func(text string) func() int64 {
		return func() int64 { return int64(strings.Count(s.Logs(), text)) }
	}
	before := snapshot(t, s.Runner)
	for _, phase := range []struct {
		name    string
		url     string // of the coordinator
		token   string // where the token is asked for
		args    []string
		stopped bool         // the gateway's process
		reached func() int64 // rises once the phase is there
	}{
		{name: "token", token: at("http", portToken) + "/?a=b", reached: h.token.Load},
		{name: "tls", url: at("https", portTLS), reached: h.tls.Load},
		{name: "request", url: at("https", portRequest), reached: h.request.Load},
		{name: "gateway", stopped: true, reached: logged(`"event_code":"session.join"`)},
		{name: "target", args: []string{"--wait-for", s.Target(stage.PortOther + 1)}, reached: logged(`"msg":"session admitted"`)},
	} {
		for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			if phase.stopped {
				must(t, s.Gateway().Signal(syscall.SIGSTOP))
			}
			job := newJob(t, s, stage.JobOptions{})
			if phase.token != "" {
				job.Setenv("ACTIONS_ID_TOKEN_REQUEST_URL", phase.token)
			}
			if phase.url != "" {
				job.Setenv("CULVERT_COORDINATOR", phase.url)
			}
			count := phase.reached()
			proc, err := job.Start(s.Binary("culvert"), append([]string{"up", "--mode", "tun"}, phase.args...)...)
			must(t, err)
			eventually(t, time.Minute, phase.name, func() error {
				select {
				case <-proc.Done():
					t.Fatalf("%s: up has ended\n%s", phase.name, s.Logs())
				default:
				}
				if phase.reached() == count {
					return fmt.Errorf("nobody came")
				}
				return nil
			})
			must(t, proc.Signal(signal))
			began := time.Now()
			if code, err := proc.Wait(timeout(t, 40*time.Second)); err != nil || code != 1 {
				t.Errorf("%s, %v: exit %d, %v", phase.name, signal, code, err)
			}
			t.Logf("%s, %v: %d ms", phase.name, signal, time.Since(began).Milliseconds())
			if phase.stopped {
				must(t, s.Gateway().Signal(syscall.SIGCONT))
			}
			eventually(t, time.Minute, "the end of its processes", func() error {
				if left := s.Runner.Processes(); len(left) > 0 {
					return fmt.Errorf("%v", left)
				}
				return nil
			})
			unchanged(t, s.Runner, before)
		}
	}
}
