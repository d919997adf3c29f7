package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/client/agent"
	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/client/token"
	"github.com/culvertnet/culvert/internal/cores"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// upCommand joins a network.
type upCommand struct {
	Coordinator  string        `env:"CULVERT_COORDINATOR" placeholder:"URL" help:"The coordinator's URL."`
	Network      string        `env:"CULVERT_NETWORK" help:"Network to join; may be left out where the coordinator has one."`
	Mode         string        `env:"CULVERT_MODE" enum:"auto,tun,kernel,proxy" default:"auto" help:"How programs get into the tunnel: tun is a network interface and needs CAP_NET_ADMIN, kernel is one with the kernel's own WireGuard and needs root, proxy is SOCKS5 and HTTP on loopback, auto takes tun where it can (${enum})."`
	WaitFor      []string      `env:"CULVERT_WAIT_FOR" placeholder:"HOST:PORT" help:"Return only when this answers through the tunnel, too. Repeatable."`
	GatewayKey   []string      `env:"CULVERT_GATEWAY_KEY" placeholder:"KEY" help:"Talk to no gateway but the one with this public key. Repeatable."`
	Timeout      time.Duration `env:"CULVERT_TIMEOUT" default:"60s" help:"Give up when the tunnel is not usable by then."`
	Foreground   bool          `env:"CULVERT_FOREGROUND" help:"Stay until interrupted instead of running in the background."`
	ProxyListen  string        `env:"CULVERT_PROXY_LISTEN" default:"127.0.0.1:0" placeholder:"IP:PORT" help:"Where the proxy of mode proxy listens; loopback only."`
	Forward      []string      `env:"CULVERT_FORWARD" placeholder:"PORT:HOST:PORT" help:"Have this port of loopback lead to a target in the network, which has to be granted, in every mode: 5432:db.internal:5432. Repeatable."`
	Direct       []string      `env:"CULVERT_DIRECT" placeholder:"DEST" help:"Keep this outside the tunnel, whatever is granted: an address, a CIDR, a host name, or github for GitHub's services. Repeatable."`
	Shared       bool          `env:"CULVERT_SHARED" help:"Let every user of this machine use the interface. Otherwise it is this user's, root's and the system's own services', except on GitHub's own runners and where root itself starts it."`
	Job          string        `env:"CULVERT_JOB" placeholder:"RUNNER/JOB" help:"Which runner of this machine this is, and which of its jobs. Tunnels that other jobs of the same runner have left are ended first."`
	InsecureHTTP bool          `name:"insecure-http" env:"CULVERT_INSECURE_HTTP" help:"Allow plain http:// to a coordinator that is not on loopback."`
	LogLevel     slog.Level    `env:"CULVERT_LOG_LEVEL" default:"warn" placeholder:"LEVEL" help:"What to log on standard error until the tunnel is up: debug, info, warn or error."`
	LogFile      string        `env:"CULVERT_LOG_FILE" placeholder:"FILE" help:"Log to this file as well, also once the tunnel is up."`
}

func (c *upCommand) run(ctx context.Context, env environment, flags common) error {
	if c.Foreground {
		return c.stay(ctx, env, flags)
	}
	// The child would find out, too, but it is quicker and clearer to say so before there is one.
	if err := c.check(env, flags); err != nil {
		return err
	}
	endLeftovers(ctx, c.Job)
	ready, err := launch(ctx, env)
	if err != nil {
		return err
	}
	show(env, flags, *ready)
	return nil
}

// check refuses a command line that cannot work.
func (c *upCommand) check(env environment, flags common) error {
	if err := control.ValidateName(flags.name()); err != nil {
		return err
	}
	opts, err := c.options(env, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	_, err = agent.New(opts)
	return err
}

// options turns flags into the agent's options.
func (c *upCommand) options(env environment, log *slog.Logger) (agent.Options, error) {
	pins := make([]wire.Key, len(c.GatewayKey))
	for i, text := range c.GatewayKey {
		key, err := wire.ParseKey(text)
		if err != nil {
			return agent.Options{}, problem.Wrap(err, problem.Usage, fmt.Sprintf("--gateway-key %q: %v", text, err),
				"give the key that the gateway prints at its start")
		}
		pins[i] = key
	}
	forwards := make([]proxy.Forward, len(c.Forward))
	for i, text := range c.Forward {
		var err error
		if forwards[i], err = proxy.ParseForward(text); err != nil {
			return agent.Options{}, err
		}
	}
	return agent.Options{
		Forwards:     forwards,
		Coordinator:  c.Coordinator,
		Network:      c.Network,
		Mode:         c.mode(),
		Job:          c.Job,
		User:         c.user(env),
		Pins:         pins,
		WaitFor:      c.WaitFor,
		Direct:       c.Direct,
		Timeout:      c.Timeout,
		InsecureHTTP: c.InsecureHTTP,
		ProxyListen:  c.ProxyListen,
		ProxyUsers:   control.Users(),
		Client:       fmt.Sprintf("culvert/%s (%s/%s)", buildVersion(), runtime.GOOS, runtime.GOARCH),
		Started:      env.started,
		Reserved:     runnerHosts(env.getenv),
		Logger:       log,
		Tokens: func(client *http.Client) (agent.TokenSource, error) {
			return token.FromEnv(env.getenv, client)
		},
	}, nil
}

// user is whose interface it is to be, 0 for everybody's. GitHub's own runners are one job's as a whole, and root can be any user.
func (c *upCommand) user(env environment) int {
	users := control.Users()
	switch user := users[len(users)-1]; {
	case c.Shared || env.getenv("RUNNER_ENVIRONMENT") == "github-hosted":
		return 0
	case users[0] > 0: // not root, and yet with the right to make an interface
		return users[0]
	default:
		return user // who called sudo
	}
}

// endLeftovers ends the tunnels that other jobs of this runner have left: it runs one at a time. What does not end now does with its lease.
func endLeftovers(ctx context.Context, job string) {
	runner, _, ok := strings.Cut(job, "/")
	if !ok || runner == "" {
		return
	}
	for _, other := range control.Tunnels(ctx, "") {
		if strings.HasPrefix(other.Job, runner+"/") && other.Job != job {
			_ = endTunnel(ctx, other.Name)
		}
	}
}

// runnerHosts are the servers that the runner reports to: names that the job cannot do without.
func runnerHosts(getenv func(string) string) []string {
	var hosts []string
	for _, name := range []string{"GITHUB_SERVER_URL", "GITHUB_API_URL", "GITHUB_GRAPHQL_URL", "ACTIONS_RUNTIME_URL", "ACTIONS_RESULTS_URL",
		"ACTIONS_CACHE_URL", token.EnvURL} {
		if u, err := url.Parse(getenv(name)); err == nil && u.Hostname() != "" {
			hosts = append(hosts, u.Hostname())
		}
	}
	return hosts
}

func (c *upCommand) mode() agent.Mode {
	switch {
	case c.Mode == "auto" && host.Privileged():
		return agent.ModeTUN
	case c.Mode == "auto":
		return agent.ModeProxy
	}
	return agent.Mode(c.Mode)
}

// stay runs the tunnel in this process.
func (c *upCommand) stay(ctx context.Context, env environment, flags common) error {
	thrifty := spend(env)
	ctx, detach := attach(ctx, env)
	log, recent, err := c.logger(env)
	if err != nil {
		return err
	}
	defer recent.Close()
	server, err := control.Listen(flags.name(), log)
	if err != nil {
		return err
	}
	defer server.Close()
	opts, err := c.options(env, log)
	if err != nil {
		return err
	}
	opts.Name = flags.name()
	var tunnel *agent.Agent
	var work sync.WaitGroup
	ctx, end := context.WithCancel(ctx)
	defer work.Wait()
	defer end()
	opts.OnReady = func(r agent.Ready) {
		detach() // first: having read the result, the other process ends
		if env.getenv("GOMAXPROCS") == "" {
			work.Go(func() { cores.Adapt(ctx, tunnel.Carried) })
		}
		work.Go(func() { thrifty(ctx) })
		show(env, flags, r)
		if env.launched {
			recent.quiet()
			letGo()
		}
	}
	if tunnel, err = agent.New(opts); err != nil {
		return err
	}
	server.Serve(&service{Agent: tunnel, log: recent})
	if err = tunnel.Run(ctx); err != nil {
		log.Info("ended", "code", problem.CodeOf(err), "err", err, "cause", errors.Unwrap(problem.From(err)))
	}
	return err
}

// How much of what lives the heap may grow by before garbage is collected, in percent, and for how long more after the join.
const (
	joinGrowth = 400
	idleGrowth = 20
	afterJoin  = time.Second
)

// spend has next to no garbage collected while the tunnel comes up: on a busy machine that would take half of a join's processor
// time. What it gives has it collected early from then on: the heap is packet buffers, which cost nothing to scan but 64 KiB each
// to keep, and a runner's memory is the job's. It returns when that is so, or ctx has ended.
func spend(env environment) (thrifty func(ctx context.Context)) {
	if env.getenv("GOGC") != "" {
		return func(context.Context) {}
	}
	debug.SetGCPercent(joinGrowth)
	return func(ctx context.Context) {
		timer := time.NewTimer(afterJoin)
		defer timer.Stop()
		select {
		case <-timer.C:
			debug.SetGCPercent(idleGrowth)
			debug.FreeOSMemory()
		case <-ctx.Done():
		}
	}
}

// askLimit is how long a status waits for what the gateway has to say.
const askLimit = time.Second

// service is what the control socket serves.
type service struct {
	*agent.Agent
	log *ring
}

// Status is the agent's with the log's last lines.
func (s *service) Status() control.Status {
	st := s.Agent.Status()
	ctx, cancel := context.WithTimeout(context.Background(), askLimit)
	defer cancel()
	s.Agent.Reached(ctx, &st)
	st.Log = s.log.Lines()
	return st
}

// logger logs to standard error, to memory, and to the log file where there is one.
func (c *upCommand) logger(env environment) (*slog.Logger, *ring, error) {
	recent := newRing(env.stderr, c.LogLevel)
	if c.LogFile != "" {
		file, err := os.OpenFile(c.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, nil, problem.Wrap(err, problem.Usage, fmt.Sprintf("the log file cannot be opened: %v", err),
				"give --log-file a place that this user may write to")
		}
		recent.file = file
	}
	return slog.New(recent.handler()), recent, nil
}

// show prints what up has to say.
func show(env environment, flags common, r agent.Ready) {
	if flags.JSON {
		print(env.stdout, r)
		return
	}
	writeReady(env.stdout, r)
}

func writeReady(w io.Writer, r agent.Ready) {
	fmt.Fprintf(w, "up: network %s as %s, gateway %s by a path %s (%.1f ms), %.0f ms in all\n",
		r.Network, r.Address, r.Gateway, r.Path.Words(), r.Path.RTT, r.Timings.Total)
	for _, left := range r.LeftOut {
		fmt.Fprintf(w, "%s: granted, but directly connected here; it stays outside the tunnel\n", left)
	}
	if r.Proxy != "" {
		fmt.Fprintf(w, "proxy: %s (SOCKS5 and HTTP); `culvert exec -- CMD` uses it\n", r.Proxy)
	}
}
