package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// noSessions refuses every join.
type noSessions struct{ Sessions }

func (noSessions) Join(context.Context, session.Join) (wire.Session, error) {
	return wire.Session{}, problem.New(problem.Denied, "no", "")
}

// TestSlowBodiesHoldNoPlace: whoever sends no more than headers must not keep jobs from joining.
func TestSlowBodiesHoldNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := New(Options{
			Sessions: noSessions{}, Store: struct{ Presences }{}, MaxJoins: 1,
			Rules: Rules{Config: &config.Config{}, Identities: struct{ Identities }{}},
		})
		if err != nil {
			t.Fatal(err)
		}
		body, stop := io.Pipe()
		go a.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("POST", wire.PathSessions, body))
		synctest.Wait()
		w := httptest.NewRecorder()
		a.ServeHTTP(w, httptest.NewRequest("POST", wire.PathSessions, strings.NewReader("{}")))
		if p := problem.Read(w.Result()); p.Code != problem.Denied {
			t.Errorf("a job is told %v", p)
		}
		stop.Close()
		synctest.Wait()
	})
}

// TestRequestsOverTheRateDoNotFillTheLog: whoever sends them chooses their number and their paths.
func TestRequestsOverTheRateDoNotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a, err := New(Options{
			Sessions: noSessions{}, Store: struct{ Presences }{}, Rate: 1, Burst: 1, Logger: slog.New(slog.NewTextHandler(&log, nil)),
			Rules: Rules{Config: &config.Config{}, Identities: struct{ Identities }{}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			a.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("DELETE", wire.PathSessions+"/"+strings.Repeat("x", 4096), nil))
		}
		if log.Len() == 0 || log.Len() > 1024 {
			t.Errorf("100 requests write %d bytes of log", log.Len())
		}
	})
}
