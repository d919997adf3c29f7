package load_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/load"
	"github.com/culvertnet/culvert/coordinator/server"
	"github.com/culvertnet/culvert/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// coordinator starts one on loopback that trusts the issuer, with more lines in its configuration.
func coordinator(t *testing.T, issuer, more string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	doc := fmt.Sprintf(`
url: https://culvert.test
listen: "127.0.0.1:0"
udp: off
probe: off
state: {dir: state}
trusted_proxies: [127.0.0.1]
issuers: [{url: %q}]
networks: {load: {gateways: [{issuer: %q, subject: culvert-load}]}}
rules: [{name: load, network: load, match: {repository_owner_id: 1, repository_id: 2}, allow: ["tcp 10.20.0.5:5432"]}]
%s
`, issuer, issuer, more)
	if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Options{Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return "http://" + s.Addr().String()
}

// freeAddr gives an address that nobody listens on now.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A whole run against a real coordinator: what is asked for is what is played, sessions renew and end, and the report adds up.
func TestRun(t *testing.T) {
	addr := freeAddr(t)
	issuer := "http://" + addr
	at := coordinator(t, issuer, "")
	report, err := load.Run(t.Context(), load.Options{
		Coordinators: []string{at}, URL: "https://culvert.test", Issuer: issuer, Network: "load", Gateways: 3,
		Sessions: 20, Burst: 30, Rate: 50, Duration: 2 * time.Second, RenewEvery: time.Second, Hold: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if err := report.WriteText(&text); err != nil {
		t.Error(err)
	}
	t.Log(text.String())
	if n := report.Failed(); n != 0 {
		t.Errorf("%d things went wrong", n)
	}
	var joins []int
	for _, p := range report.Phases {
		joins = append(joins, p.Joins)
		if p.P50 <= 0 || p.P50 > p.P90 || p.P90 > p.P99 || p.P99 > p.Max {
			t.Errorf("%s: %+v", p.Name, p)
		}
	}
	if fmt.Sprint(joins) != "[20 30 100]" || report.Verified < 151 || report.Gateways != 3 {
		t.Errorf("%v joins, %+v", joins, report)
	}
	for _, want := range []string{"fill", "burst", "steady", "3 gateways verified"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text says nothing of %q", want)
		}
	}
}

// What the coordinator refuses is in the report, by code.
func TestErrorsAreCounted(t *testing.T) {
	addr := freeAddr(t)
	issuer := "http://" + addr
	at := coordinator(t, issuer, "limits: {repository: 1}")
	report, err := load.Run(t.Context(), load.Options{
		Coordinators: []string{at}, URL: "https://culvert.test", Issuer: issuer, Network: "load", Gateways: 1, Burst: 40,
	})
	if err != nil {
		t.Fatal(err)
	}
	p := report.Phases[0]
	if n := p.Errors[string(problem.RateLimited)]; n == 0 || n+p.Joins != 40 || report.Failed() != n {
		t.Errorf("%+v", p)
	}
}

func TestWhatCannotBePlayed(t *testing.T) {
	good := load.Options{Coordinators: []string{"https://c.example"}, Issuer: "https://i.example", Network: "load"}
	if err := good.Validate(); err != nil || good.IssuerListen != "i.example:443" || good.URL != "https://c.example" {
		t.Errorf("%+v, %v", good, err)
	}
	for name, edit := range map[string]func(o *load.Options){
		"no coordinator":     func(o *load.Options) { o.Coordinators = nil },
		"no URL":             func(o *load.Options) { o.Coordinators = []string{"culvert"} },
		"plain HTTP":         func(o *load.Options) { o.Coordinators = []string{"http://c.example"} },
		"no issuer":          func(o *load.Options) { o.Issuer = "" },
		"plain issuer":       func(o *load.Options) { o.Issuer = "http://192.0.2.1" },
		"no network":         func(o *load.Options) { o.Network = "" },
		"too many gateways":  func(o *load.Options) { o.Gateways = 1_000_000 },
		"too many sessions":  func(o *load.Options) { o.Sessions = 1 << 40 },
		"fewer than none":    func(o *load.Options) { o.Burst = -1 },
		"too fast":           func(o *load.Options) { o.Rate = 1e9 },
		"renewing all along": func(o *load.Options) { o.RenewEvery = time.Millisecond },
	} {
		o := load.Options{Coordinators: []string{"https://c.example"}, Issuer: "https://i.example", Network: "load"}
		edit(&o)
		if _, err := load.Run(t.Context(), o); problem.CodeOf(err) != problem.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A coordinator that is not there, or does not speak, is an error that says so within the time that one join may take, and nothing is
// left running. So is one that refuses its gateways for good, or is not
// what its URL says; one that may let them in later is waited for, until somebody ends that.
func TestNoCoordinator(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0") // connections wait in its queue for ever
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	strict := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			problem.Write(w, problem.New(problem.Unauthorized, "this gateway is not enrolled", "enrol it"))
		}
	}))
	defer strict.Close()
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			problem.Write(w, problem.New(problem.RateLimited, "too many of these", "wait"))
		}
	}))
	defer busy.Close()
	encrypted := httptest.NewUnstartedServer(http.NotFoundHandler())
	encrypted.Config.ErrorLog = log.New(io.Discard, "", 0) // the handshake that fails
	encrypted.StartTLS()
	defer encrypted.Close()
	dead := "http://" + freeAddr(t)
	for name, c := range map[string]struct {
		at    []string
		ended bool // by whoever asked, after a while
		code  problem.Code
		says  string
	}{
		"dead":     {[]string{dead}, false, problem.Unreachable, "the coordinator does not answer: GET " + dead + "/healthz: dial tcp"},
		"mute":     {[]string{"http://" + mute.Addr().String()}, false, problem.Unreachable, "deadline exceeded"},
		"both":     {[]string{dead, "http://" + mute.Addr().String()}, false, problem.Unreachable, "none of 2 coordinators answers: GET " + dead},
		"busy":     {[]string{busy.URL}, true, problem.Cancelled, "waiting for the stream of gateway load-001: too many of these"},
		"refusing": {[]string{strict.URL}, false, problem.Unauthorized, "this gateway is not enrolled"},
		"not TLS":  {[]string{strings.Replace(strict.URL, "http:", "https:", 1)}, false, problem.NoTLS, "does not speak TLS"},
		"stranger": {[]string{encrypted.URL}, false, problem.Certificate, "is not trusted"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			log := slog.New(slog.DiscardHandler)
			if c.ended {
				log = slog.New(slog.NewTextHandler(&endsAt{what: "too many of these", end: cancel}, nil))
			}
			began := time.Now()
			limit := 20 * time.Second
			if strings.Contains(c.says, "deadline") || len(c.at) > 1 { // of what never answers
				limit = 500 * time.Millisecond
			}
			_, err := load.Run(ctx, load.Options{Coordinators: c.at, Issuer: "http://" + freeAddr(t), Network: "load", Gateways: 1, Timeout: limit, Logger: log})
			if p := problem.From(err); err == nil || p.Code != c.code || !strings.Contains(p.Message, c.says) || p.Next == "" || p.Code.Exit() != problem.ExitFailed {
				t.Errorf("%v", err)
			}
			if took := time.Since(began); took > 12*time.Second && !c.ended {
				t.Errorf("after %v", took)
			}
		})
	}
}

// endsAt calls end once a text is written to it.
type endsAt struct {
	what string
	end  func()
}

func (e *endsAt) Write(b []byte) (int, error) {
	if strings.Contains(string(b), e.what) {
		e.end()
	}
	return len(b), nil
}

// The keys may go by a file as well.
func TestKeysInAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.json")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := load.Run(ctx, load.Options{
		Coordinators: []string{"http://" + freeAddr(t)}, Issuer: "https://issuer.test", JWKSFile: file, Network: "load",
	})
	if data, rerr := os.ReadFile(file); err == nil || rerr != nil || !strings.Contains(string(data), `"RS256"`) || strings.Contains(string(data), `"d"`) {
		t.Errorf("%s, %v, %v", data, rerr, err)
	}
}
