package agent

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// knock asks the services as if from an address inside the tunnel.
func (r *rig) knock(from netip.Addr, method, path string, in any) *httptest.ResponseRecorder {
	r.t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		r.t.Fatal(err)
	}
	req := httptest.NewRequest(method, "http://198.18.0.1"+path, bytes.NewReader(b))
	req.RemoteAddr = netip.AddrPortFrom(from, 40000).String()
	w := httptest.NewRecorder()
	r.door.insideHandler().ServeHTTP(w, req)
	return w
}

func codeOf(w *httptest.ResponseRecorder) problem.Code {
	if w.Code == http.StatusOK {
		return ""
	}
	return problem.Read(w.Result()).Code
}

func TestASessionIsKnownByItsAddress(t *testing.T) {
	r := newRig(t, "", ownerID)
	a, b := r.mustAdmit(r.fresh()), r.mustAdmit(r.fresh())
	for _, s := range []*session{a, b} {
		for _, from := range s.addrs {
			var me wire.InsideSession
			w := r.knock(from, "GET", wire.PathInsideMe, nil)
			if err := json.Unmarshal(w.Body.Bytes(), &me); err != nil || me.Session != s.id {
				t.Errorf("from %s: %s", from, w.Body)
			}
		}
	}
	if got := codeOf(r.knock(netip.MustParseAddr("198.18.9.9"), "GET", wire.PathInsideMe, nil)); got != problem.SessionOver {
		t.Errorf("a stranger gets %q", got)
	}
	// One session's token does not renew another's, though both are of the same run.
	if got := codeOf(r.knock(a.addrs[0], "POST", wire.PathRenew, wire.InsideRenew{Token: r.token(b.key, nil)})); got != problem.TokenAudience {
		t.Errorf("renewal with another session's token: %q", got)
	}
	if len(r.renewed) != 0 {
		t.Error("a refused renewal is passed on")
	}
	fresh := r.token(a.key, nil)
	if got := codeOf(r.knock(a.addrs[0], "POST", wire.PathRenew, wire.InsideRenew{Token: fresh})); got != "" {
		t.Errorf("renewal: %q", got)
	}
	if len(r.renewed) != 1 || r.renewed[0].Session != a.id || r.renewed[0].Token != fresh {
		t.Errorf("passed on: %+v", r.renewed)
	}
	if strings.Contains(r.log.String(), fresh.Reveal()[:40]) {
		t.Error("the token is in the log")
	}
	r.door.table.cancel(a.id, "over")
	if got := codeOf(r.knock(a.addrs[0], "GET", wire.PathInsideMe, nil)); got != problem.SessionOver {
		t.Errorf("after the end: %q", got)
	}
}

// TestASessionFillsNoLog: what a session asks of the gateway itself is bounded, and what it does wrong is logged a few times.
func TestASessionFillsNoLog(t *testing.T) {
	r := newRig(t, "", ownerID)
	s, other := r.mustAdmit(r.fresh()), r.mustAdmit(r.fresh())
	if q, l := s.questions, s.said; q.Limit() != questionRate || q.Burst() != questionBurst || l.Limit() != lineRate || l.Burst() != lineBurst {
		t.Errorf("questions %v, %d; lines %v, %d", q.Limit(), q.Burst(), l.Limit(), l.Burst())
	}
	s.questions, s.said = rate.NewLimiter(0, 30), rate.NewLimiter(0, 3)
	for i := range 40 {
		w := r.knock(s.addrs[i%2], "POST", wire.PathRenew, wire.InsideRenew{Token: "no token"})
		got, cut := codeOf(w), w.Header().Get("Connection") == "close" // renewals have a limit of their own
		if over := i >= 30; cut != over || over && got != problem.RateLimited {
			t.Fatalf("request %d: %q", i, got)
		}
	}
	if n := strings.Count(r.log.String(), "refused") + strings.Count(r.log.String(), "failed"); n > 3 {
		t.Errorf("%d lines of one session", n)
	}
	if got := codeOf(r.knock(other.addrs[0], "GET", wire.PathInsideMe, nil)); got != "" {
		t.Errorf("another session: %q", got)
	}
}

func TestInsideRefusals(t *testing.T) {
	r := newRig(t, "", ownerID)
	s := r.mustAdmit(r.fresh())
	for name, c := range map[string]struct {
		method, path string
		in           any
		code         problem.Code
	}{
		"unknown path":     {"GET", "/", nil, problem.NotFound},
		"wrong method":     {"GET", wire.PathRenew, nil, problem.NotFound},
		"no document":      {"POST", wire.PathReach, "x", problem.BadRequest},
		"no name":          {"POST", wire.PathReach, wire.ReachRequest{Target: "d b:5432"}, problem.BadRequest},
		"target sans port": {"POST", wire.PathReach, wire.ReachRequest{Target: "10.20.0.5"}, problem.BadRequest},
		"port zero":        {"POST", wire.PathReach, wire.ReachRequest{Target: "10.20.0.5:0"}, problem.BadRequest},
		"too large":        {"POST", wire.PathRenew, strings.Repeat("x", wire.MaxInsideBody), problem.TooLarge},
	} {
		if got := codeOf(r.knock(s.addrs[0], c.method, c.path, c.in)); got != c.code {
			t.Errorf("%s: %q, want %q", name, got, c.code)
		}
	}
}

func TestTriesOfTargetsAreLimited(t *testing.T) {
	r := newRig(t, "", ownerID)
	s := r.mustAdmit(r.fresh())
	try := func() problem.Code {
		return codeOf(r.knock(s.addrs[0], "POST", wire.PathReach, wire.ReachRequest{Target: "10.20.0.5:5432"}))
	}
	for range cap(s.tries) {
		s.tries <- struct{}{}
	}
	if got := try(); got != problem.RateLimited {
		t.Errorf("more at once than places: %q", got)
	}
	<-s.tries
	if got := try(); got != "" {
		t.Errorf("with a place: %q", got)
	}
	var refused bool
	for range 200 {
		refused = refused || try() == problem.RateLimited
	}
	if !refused {
		t.Error("200 tries in no time are not refused")
	}
}

func FuzzDecodeInside(f *testing.F) {
	f.Add([]byte(`{"token":"x"}`))
	f.Add([]byte(`{"target":"10.0.0.1:5432"}{}`))
	f.Add([]byte(`{"names":[{"name":"api.svc.corp","addr":"198.19.0.7"},{"addr":""}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var renew wire.InsideRenew
		var reach wire.ReachRequest
		var take wire.InsideTake
		for _, v := range []any{&renew, &reach, &take} {
			if err := decode(bytes.NewReader(b), v); err != nil && problem.CodeOf(err) != problem.BadRequest {
				t.Errorf("%q: %v", b, err)
			}
		}
	})
}
