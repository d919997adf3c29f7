//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

// demo is one performance.
type demo struct {
	screen *screen
	bin    string
	dir    string
	stage  *stage.Stage
	job    *stage.Job
	mode   string // of the job's tunnel: tun or proxy
}

// play sets the stage and shows every step. The error is that of a stage that could not be set; a step that does not hold
// is on the screen. apart is why there are no namespaces, or nil.
func (d *demo) play(ctx context.Context, apart error) error {
	opts := stage.Options{Binaries: d.bin, Dir: d.dir, Flat: apart != nil}
	if opts.Flat {
		// A gateway opens its own addresses only where its own policy names them, too.
		opts.Policy = func(s *stage.Stage) string { return "rules:\n" + s.DefaultRules() }
	}
	s, err := stage.New(ctx, opts)
	if err != nil {
		return err
	}
	defer s.Close()
	d.stage, d.mode = s, "tun"
	noTUN := lab.TUN()
	if apart != nil || noTUN != nil {
		d.mode = "proxy"
	}
	d.introduce(apart, noTUN)
	if err := s.Start(ctx); err != nil {
		return err
	}
	if d.job, err = s.Job(stage.JobOptions{Unprivileged: d.mode == "proxy"}); err != nil {
		return err
	}
	defer d.leave(ctx)
	d.steps(ctx, apart)
	if d.screen.failed > 0 {
		fmt.Fprintf(os.Stderr, "\n%s", s.Logs())
	}
	return nil
}

// leave takes the tunnel down whatever happened: on a flat stage nothing else would.
func (d *demo) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_, _ = d.culvert(ctx, "down")
}

func (d *demo) introduce(apart, noTUN error) {
	s := d.stage
	d.screen.title("Culvert: a CI job reaches one private service, and nothing else")
	if apart != nil {
		d.screen.line("Everything runs on this machine itself, because it gives this user no network")
		d.screen.line("namespaces, so nothing here is really apart from anything:")
		d.screen.line("  " + apart.Error())
	} else {
		left, right := "%-13s %-15s ", "%-8s %s"
		for _, l := range []string{
			fmt.Sprintf(left+"── NAT ──┐               ┌── NAT ──── "+right, "the job", s.Runner.Addr(), "gateway", s.GatewayBox.Addr()),
			fmt.Sprintf(left+"         ├─ (internet) ──┤       └── "+right, "", "", "service", s.Private.Addr()),
			fmt.Sprintf(left+"─────────┘               └────────── "+right, "coordinator", s.Cloud.Addr(), "issuer", s.IssuerHost.Addr()),
		} {
			d.screen.line(l)
		}
		d.screen.line("")
		d.screen.line("Each is a network namespace of its own; the gateway has no privilege at all.")
		if noTUN != nil {
			d.screen.line("The job's tunnel ends in a proxy, because it can have no TUN device:")
			d.screen.line("  " + noTUN.Error())
		}
	}
	d.screen.line("")
}

func (d *demo) steps(ctx context.Context, apart error) {
	s, service := d.screen, "http://"+d.stage.Target(stage.PortHTTP)
	s.step("the job proves who it is", func() ([]string, error) { return d.prove(ctx) })
	if apart == nil {
		s.step("before: the service is out of the job's reach", func() ([]string, error) { return d.unreachable(ctx, service) })
	} else {
		s.cannot("before: the service is out of the job's reach", "on one machine everybody reaches it")
	}
	denied := func() ([]string, error) { return d.denied(ctx) }
	const stranger = "a job from another repository is denied, and told why"
	if d.stage.Private.Addr().IsLoopback() {
		s.step(stranger, denied)
		s.cannot("a job that reaches the service", "this machine has no address beyond loopback, which never goes into a tunnel")
		return
	}
	if !s.step("the job joins", func() ([]string, error) { return d.up(ctx) }) {
		return
	}
	s.step("the service answers through the tunnel", func() ([]string, error) { return d.reach(ctx, service) })
	s.step("a destination outside the grant is reset", func() ([]string, error) { return d.outside(ctx) })
	s.step(stranger, denied)
	s.step("the job leaves", func() ([]string, error) { return d.down(ctx) })
	if apart == nil {
		s.step("after: the service is out of the job's reach again", func() ([]string, error) { return d.unreachable(ctx, service) })
	} else {
		s.step("after: there is no tunnel to go through", func() ([]string, error) { return d.noTunnel(ctx, service) })
	}
}

// prove asks the issuer for a token as a runner does and verifies it as coordinator and gateway do.
func (d *demo) prove(ctx context.Context) ([]string, error) {
	key, err := wire.NewPrivateKey()
	if err != nil {
		return nil, err
	}
	audience := wire.Audience(d.stage.URL, key.Public())
	token, err := d.token(ctx, audience)
	if err != nil {
		return nil, err
	}
	client := d.stage.Client(d.stage.Cloud, 5*time.Second)
	verifier, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: d.stage.Issuer.URL()}}, HTTPClient: client})
	if err != nil {
		return nil, err
	}
	defer verifier.Close()
	c, err := verifier.Verify(ctx, token, audience)
	if err != nil {
		return nil, err
	}
	details := []string{"issuer      " + c.Issuer}
	for _, name := range []string{"repository", "ref", "environment", "event_name"} {
		value, ok := c.Get(name)
		if !ok {
			return details, fmt.Errorf("the token has no claim %s", name)
		}
		details = append(details, fmt.Sprintf("%-11s %s", name, value))
	}
	return append(details, "audience    "+audience, "            (this coordinator, and the job's own key: worthless to a thief)"), nil
}

func (d *demo) token(ctx context.Context, audience string) (string, error) {
	asks := d.stage.Issuer.AddJob(stage.Claims(nil))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, asks.RequestURL+"&audience="+url.QueryEscape(audience), nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+asks.RequestToken)
	resp, err := d.stage.Client(d.stage.Runner, 5*time.Second).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct {
		Value string `json:"value"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the issuer answers %s: %w", resp.Status, err)
	}
	return answer.Value, nil
}

// culvert runs the client in the job, under a name of the demo's own: off namespaces there may be another tunnel.
func (d *demo) culvert(ctx context.Context, command string, args ...string) (stage.Result, error) {
	return d.job.Culvert(ctx, append([]string{command, "--json", "--name", "culvert-demo"}, args...)...)
}

func (d *demo) up(ctx context.Context) ([]string, error) {
	result, err := d.culvert(ctx, "up", "--mode", d.mode, "--wait-for", d.stage.Target(stage.PortHTTP))
	if err != nil {
		return nil, err
	}
	if result.Code != 0 {
		return nil, errors.New(result.String())
	}
	var ready struct {
		Address string             `json:"address"`
		Timings map[string]float64 `json:"timings"`
	}
	if err := json.Unmarshal([]byte(result.Stdout), &ready); err != nil {
		return nil, fmt.Errorf("read what culvert up prints: %w", err)
	}
	var phases []string
	for _, phase := range []string{"token", "join", "path", "handshake", "usable", "total"} {
		phases = append(phases, fmt.Sprintf("%s %.0f", phase, ready.Timings[phase+"_ms"]))
	}
	return []string{
		fmt.Sprintf("culvert up --mode %s gives the job %s", d.mode, ready.Address),
		"ms since its start: " + strings.Join(phases, " · "),
	}, nil
}

// request fetches a URL as a program of the job: through the interface in mode tun, by culvert exec in mode proxy.
func (d *demo) request(ctx context.Context, url string) (string, error) {
	if d.mode == "tun" {
		return get(d.stage.Client(d.stage.Runner, 3*time.Second), url)
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = d.stage.Publish(self); err != nil {
		return "", err
	}
	result, err := d.culvert(ctx, "exec", "--", self, "-fetch", url)
	if err != nil {
		return "", err
	}
	if p := result.Problem(); p != nil {
		return "", errors.New(p.Message)
	}
	if result.Code != 0 {
		return "", errors.New(strings.TrimSpace(result.Stderr))
	}
	return result.Stdout, nil
}

func (d *demo) reach(ctx context.Context, url string) ([]string, error) {
	got, err := d.request(ctx, url)
	if err != nil {
		return nil, err
	}
	if got != stage.Greeting {
		return nil, fmt.Errorf("%s answers %q, want %q", url, got, stage.Greeting)
	}
	return []string{fmt.Sprintf("GET %s → %q", url, strings.TrimSpace(got))}, nil
}

// unreachable wants no answer from the job's own network.
func (d *demo) unreachable(ctx context.Context, url string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := d.stage.Runner.Dial(ctx, "tcp", strings.TrimPrefix(url, "http://"))
	if err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s is reachable without a tunnel", url)
	}
	return []string{cause(err)}, nil
}

// outside wants the gateway to reset what the grant does not give, at once, though something listens there.
func (d *demo) outside(ctx context.Context) ([]string, error) {
	target := d.stage.Target(stage.PortOther)
	direct, err := get(d.stage.Client(d.stage.GatewayBox, 3*time.Second), "http://"+target)
	if err != nil || direct != stage.Greeting {
		return nil, fmt.Errorf("nothing listens there, so a reset shows nothing: %w", err)
	}
	began := time.Now()
	got, err := d.request(ctx, "http://"+target)
	if err == nil {
		return nil, fmt.Errorf("%s answers %q", target, got)
	}
	if d.mode == "tun" && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
		return nil, fmt.Errorf("%s is not reset: %w", target, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		return nil, fmt.Errorf("%s is refused only after %v", target, took)
	}
	return []string{fmt.Sprintf("GET http://%s → %s (the gateway's own network gets an answer)", target, cause(err))}, nil
}

func (d *demo) denied(ctx context.Context) ([]string, error) {
	other, err := d.stage.Job(stage.JobOptions{
		Claims:       map[string]any{"repository": "acme/website", "repository_id": "4712"},
		Unprivileged: d.mode == "proxy",
	})
	if err != nil {
		return nil, err
	}
	result, err := other.Culvert(ctx, "up", "--json", "--name", "culvert-demo-2", "--mode", d.mode)
	if err != nil {
		return nil, err
	}
	p := result.Problem()
	if result.Code != problem.ExitDenied || p == nil || p.Denial == nil || p.Denial.Claim != "repository" {
		return nil, fmt.Errorf("want exit %d and a denial that names the claim: %s", problem.ExitDenied, result)
	}
	return []string{
		fmt.Sprintf("exit %d, %s: %s", result.Code, p.Code, p.Message),
		fmt.Sprintf("closest rule %q: %s expected %s, got %s", p.Denial.Rule, p.Denial.Claim,
			strings.Join(p.Denial.Expected, " or "), p.Denial.Got),
	}, nil
}

func (d *demo) down(ctx context.Context) ([]string, error) {
	result, err := d.culvert(ctx, "down")
	if err != nil {
		return nil, err
	}
	if result.Code != 0 {
		return nil, errors.New(result.String())
	}
	return nil, nil
}

func (d *demo) noTunnel(ctx context.Context, url string) ([]string, error) {
	got, err := d.request(ctx, url)
	if err == nil {
		return nil, fmt.Errorf("culvert exec still answers %q", got)
	}
	return []string{cause(err)}, nil
}
