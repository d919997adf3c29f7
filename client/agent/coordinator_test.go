package agent

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// api makes a coordinator client for a server that answers with handler.
func api(t *testing.T, handler http.HandlerFunc) *coordinator {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return client(t, server.URL)
}

func client(t *testing.T, base string) *coordinator {
	t.Helper()
	c := &coordinator{base: base, http: newOutside().client()}
	t.Cleanup(c.http.CloseIdleConnections)
	return c
}

func ignore(wire.JoinEvent) error { return nil }

func TestAnswersThatAreNotCulverts(t *testing.T) {
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		want    problem.Code
	}{
		"a page": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }, problem.Incompatible},
		"a page in the stream": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", wire.MediaEvents)
			_, _ = io.WriteString(w, "{}\n<html>")
		}, problem.Incompatible},
		"another shape": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"id": 5}`) }, problem.Incompatible},
		"a stream that ends early": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", wire.MediaEvents)
		}, problem.Unreachable},
		"a stream that breaks off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", wire.MediaEvents)
			_, _ = io.WriteString(w, `{"admitted":`)
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, problem.Unreachable},
		"an endless stream": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", wire.MediaEvents)
			for range 1000 {
				if _, err := io.WriteString(w, strings.Repeat(" ", 10_000)); err != nil {
					return
				}
			}
		}, problem.Unreachable},
		"a redirect":       {http.RedirectHandler("http://127.0.0.1:1/", http.StatusTemporaryRedirect).ServeHTTP, problem.Failed},
		"a gateway's page": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "bad gateway", http.StatusBadGateway) }, problem.Unreachable},
	} {
		t.Run(name, func(t *testing.T) {
			err := api(t, c.handler).join(t.Context(), wire.JoinRequest{}, ignore)
			if problem.CodeOf(err) != c.want {
				t.Errorf("error = %v", err)
			}
		})
	}
}

func TestCoordinatorsThatCannotBeTalkedTo(t *testing.T) {
	https := httptest.NewTLSServer(http.NotFoundHandler())
	defer https.Close()
	https.Config.ErrorLog = nil
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "http://" + listener.Addr().String()
	_ = listener.Close()
	for name, c := range map[string]struct {
		base string
		want problem.Code
		says string
	}{
		"untrusted certificate": {https.URL, problem.Certificate, "certificate"},
		"plain HTTP":            {"https" + strings.TrimPrefix(plain.URL, "http"), problem.NoTLS, "does not speak TLS"},
		"nobody listens":        {closed, problem.Unreachable, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client(t, c.base).info(t.Context(), func(bool) {})
			if p := problem.From(err); p.Code != c.want || !strings.Contains(p.Message, c.says) || p.Next == "" {
				t.Errorf("error = %v", err)
			}
		})
	}
}

func TestUnknownNamesAreNotTriedAgain(t *testing.T) {
	c := client(t, "https://culvert.example.com")
	err := c.away(t.Context(), &net.DNSError{Err: "no such host", Name: "culvert.example.com", IsNotFound: true})
	if problem.Temporary(err) || problem.CodeOf(err) != problem.UnknownName {
		t.Errorf("error = %v", err)
	}
}

func TestTheCauseOfACancelledRequestIsItsError(t *testing.T) {
	cause := problem.New(problem.TokenUnavailable, "no token", "")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	_, err := api(t, func(http.ResponseWriter, *http.Request) {}).info(ctx, func(bool) {})
	if problem.CodeOf(err) != problem.TokenUnavailable {
		t.Errorf("error = %v", err)
	}
}

func TestConnectedIsToldOnceWhateverHappens(t *testing.T) {
	for name, c := range map[string]*coordinator{
		"answers": api(t, func(http.ResponseWriter, *http.Request) {}),
		"away":    client(t, "http://127.0.0.1:1"),
	} {
		told := 0
		_, _ = c.info(t.Context(), func(bool) { told++ })
		if told != 1 {
			t.Errorf("%s: told %d times", name, told)
		}
	}
}

func TestEveryAddressDialledOutsideIsKept(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	o := newOutside()
	var told []netip.Addr
	o.onNew = func(a netip.Addr) { told = append(told, a) }
	c := o.client()
	defer c.CloseIdleConnections()
	for range 2 {
		resp, err := c.Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		c.CloseIdleConnections()
	}
	want := netip.MustParseAddr("127.0.0.1")
	if len(told) != 1 || told[0] != want || len(o.list()) != 1 || o.list()[0] != want {
		t.Errorf("told %v, kept %v", told, o.list())
	}
}

func TestOptions(t *testing.T) {
	tokens := func(*http.Client) (TokenSource, error) { return tokenFunc(goodToken), nil }
	for url, ok := range map[string]bool{
		"https://culvert.example.com": true, "https://culvert.example.com/base/": true, "http://127.0.0.1:8080": true,
		"http://localhost": true, "http://[::1]:1": true, "": false, "culvert.example.com": false, "http://10.0.0.1": false,
		"https://": false, "https://a@b.example": false, "https://b.example/?q": false, "https://b.example/#f": false,
		"ftp://b.example": false, "https://b.example:x": false,
	} {
		o := Options{Coordinator: url, Tokens: tokens}
		err := o.Validate()
		if (err == nil) != ok || (!ok && problem.CodeOf(err) != problem.Usage) {
			t.Errorf("%q: %v", url, err)
		}
		if ok && (o.Timeout != time.Minute || o.Mode != ModeProxy || strings.HasSuffix(o.Coordinator, "/")) {
			t.Errorf("%q: defaults %+v", url, o)
		}
	}
	o := Options{Coordinator: "http://10.0.0.1", InsecureHTTP: true, Tokens: tokens}
	if err := o.Validate(); err != nil {
		t.Error(err)
	}
}

func TestEchoSurvivesLossAndForgery(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	defer func() { <-done }()
	defer server.Close()
	go func() {
		defer close(done)
		buf := make([]byte, 256)
		for n := 1; ; n++ {
			size, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			switch n {
			case 1: // lost
			case 2:
				_, _ = server.WriteTo([]byte("something else"), from)
			default:
				_, _ = server.WriteTo(buf[:size], from)
			}
		}
	}()
	var d net.Dialer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := echo(ctx, d.DialContext, netip.MustParseAddrPort(server.LocalAddr().String()), 0); err != nil {
		t.Error(err)
	}
	gone, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if err := echo(gone, d.DialContext, netip.MustParseAddrPort("127.0.0.1:1"), 0); err == nil {
		t.Error("a closed port echoes")
	}
}

// tokensByProxy gives no token, and says what it would go through.
type tokensByProxy struct{ proxy string }

func (b tokensByProxy) Token(ctx context.Context, _ string) (wire.Secret, error) {
	<-ctx.Done()
	return "", context.Cause(ctx)
}

func (b tokensByProxy) Proxy() *url.URL { return &url.URL{Scheme: "http", Host: b.proxy} }

// Where a proxy does not answer, the error names it and how it fails, also where only the token goes through it.
func TestDeadProxyIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	t.Setenv("HTTPS_PROXY", "http://user:secret@"+dead)
	w := agenttest.New(t)
	for name, tc := range map[string]struct {
		coordinator string
		want        []string
	}{
		"both":           {"https://culvert.example.com", []string{"neither culvert.example.com nor GitHub's token service answers through the proxy " + dead, "refused"}},
		"only the token": {w.URL, []string{"GitHub's token service does not answer through the proxy " + dead}},
	} {
		t.Run(name, func(t *testing.T) {
			var p *problem.Error
			missing := func() bool {
				return slices.ContainsFunc(tc.want, func(want string) bool { return !strings.Contains(p.Message, want) })
			}
			for limit := 2 * time.Second; limit < 20*time.Second; limit *= 4 { // a busy machine may not come so far at once
				opts := options(t, w)
				opts.Coordinator, opts.Timeout = tc.coordinator, limit
				opts.Tokens = func(*http.Client) (TokenSource, error) { return tokensByProxy{dead}, nil }
				if p = start(t, opts).failure(t); !missing() {
					break
				}
			}
			if missing() {
				t.Errorf("it says %q, not %q", p.Message, tc.want)
			}
			if p.Code != problem.Timeout || !strings.Contains(p.Next, "HTTPS_PROXY") || strings.Contains(p.Message+p.Next, "secret") {
				t.Errorf("code %s, next %q", p.Code, p.Next)
			}
		})
	}
}

// TestLeavesWhatCannotServe: a request that the coordinator at one address could not serve, because its state is away or it broke off, is made again to another
// address of the same name. A refusal is one wherever it was said.
func TestLeavesWhatCannotServe(t *testing.T) {
	var asked [2]atomic.Int32
	var answer atomic.Pointer[http.HandlerFunc]
	first := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked[0].Add(1)
		(*answer.Load())(w, r)
	}))
	defer first.Close()
	_, port, _ := net.SplitHostPort(first.Listener.Addr().String())
	l, err := net.Listen("tcp", "127.0.0.2:"+port)
	if err != nil {
		t.Skip("no second address of this machine's own:", err)
	}
	second := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked[1].Add(1)
		_, _ = io.WriteString(w, "{}")
	})}}
	second.Start()
	defer second.Close()
	say := func(h http.HandlerFunc) { answer.Store(&h) }
	away := func(w http.ResponseWriter, _ *http.Request) {
		problem.Write(w, problem.New(problem.Unreachable, "the coordinator cannot reach its state", "try again"))
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		moves   bool
	}{
		"its state is away": {away, true},
		"it breaks off":     {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, true},
		"it refuses": {func(w http.ResponseWriter, _ *http.Request) {
			problem.Write(w, problem.New(problem.NoGateway, "no gateway", "start one"))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOutside()
			c0 := &coordinator{base: "http://culvert.test:" + port, http: o.client(), avoid: o.dialer.Avoid}
			defer c0.http.CloseIdleConnections()
			o.dialer.Lookup = func(context.Context, string) ([]netip.Addr, error) {
				return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")}, nil
			}
			say(c.handler)
			var before [2]int32
			for i := range asked {
				before[i] = asked[i].Load()
			}
			if _, err := c0.update(t.Context(), "id", "secret", wire.Update{}); err == nil {
				t.Fatal("the first address serves")
			}
			_, err := c0.update(t.Context(), "id", "secret", wire.Update{})
			if moved := asked[1].Load() > before[1]; moved != c.moves || moved != (err == nil) {
				t.Errorf("moved %t, %v", moved, err)
			}
			if asked[0].Load() == before[0] {
				t.Error("the first address was never asked")
			}
		})
	}
}
