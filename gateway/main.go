// Command culvert-gateway carries CI jobs into a private network: it dials out to its coordinator, verifies every job's
// token itself and needs no privilege.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/culvertnet/culvert/gateway/agent"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/cores"
	"github.com/culvertnet/culvert/internal/problem"
)

// version is set by the linker.
var version = "dev"

type cli struct {
	Run     runCmd     `cmd:"" help:"Run a gateway until SIGTERM or SIGINT."`
	Health  healthCmd  `cmd:"" help:"Ask the gateway on this machine how it is."`
	Doctor  doctorCmd  `cmd:"" help:"Test every name and port that a gateway needs, and print the table for a firewall team."`
	Version versionCmd `cmd:"" help:"Print the version."`
}

type runCmd struct {
	Coordinator       string            `required:"" placeholder:"URL" help:"The coordinator's public URL, as in every token's audience."`
	Network           string            `required:"" help:"The network that this gateway serves."`
	Owner             []string          `placeholder:"ID" help:"Admit jobs of repositories of this owner (numeric id); may be repeated."`
	Policy            string            `placeholder:"FILE" help:"Rules of the gateway's own: jobs get no more than these and the coordinator's both give."`
	IdentityTokenFile string            `placeholder:"FILE" help:"Workload identity token for the coordinator; read anew for each connection."`
	EnrolTokenFile    string            `placeholder:"FILE" help:"Enrolment secret for the coordinator."`
	Listen            string            `default:":51820" help:"UDP port of the tunnel."`
	PublicAddress     netip.AddrPort    `placeholder:"IP:PORT" help:"Public address that is forwarded to the tunnel's port."`
	PortMapping       string            `enum:"auto,off" default:"auto" help:"Ask the router to forward the tunnel's port by PCP, NAT-PMP or UPnP, where there is no public address: auto or off."`
	StateDir          string            `placeholder:"DIR" help:"Keep the WireGuard key here, for runners that pin it; otherwise it lives in memory."`
	Metrics           string            `placeholder:"ADDR" help:"Serve /healthz, /readyz and /metrics here, for example 127.0.0.1:9091."`
	Name              string            `help:"Name in logs and answers; default the host's."`
	Issuer            []string          `placeholder:"URL" help:"Issuer of jobs' tokens; default GitHub's. --owner is about GitHub's own, or about the only one."`
	JWKSFile          map[string]string `name:"jwks-file" placeholder:"URL=FILE" help:"Read this issuer's keys from a file instead of fetching them."`
	Resolver          []netip.AddrPort  `placeholder:"IP:PORT" help:"DNS server for granted names; may be repeated; default the host's."`
	Drain             time.Duration     `default:"25s" help:"When told to stop, give sessions so long to move to another gateway or to finish; 0 stops at once."`
	MaxSessions       int               `default:"20000" help:"Sessions held at once."`
	InsecureHTTP      bool              `name:"insecure-http" help:"Accept plain HTTP beyond loopback."`
	LogFormat         string            `enum:"json,text" default:"json" help:"Logs on stderr: json or text."`
	LogLevel          slog.Level        `default:"info" help:"debug, info, warn or error."`
}

func (c *runCmd) Run() error {
	opts := agent.Options{
		Coordinator: c.Coordinator, Network: c.Network, Owners: c.Owner, PolicyFile: c.Policy,
		IdentityTokenFile: c.IdentityTokenFile, EnrolTokenFile: c.EnrolTokenFile, Listen: c.Listen,
		PublicAddress: c.PublicAddress, PortMapping: c.PortMapping == "auto", StateDir: c.StateDir, Metrics: c.Metrics, Name: c.Name,
		InsecureHTTP: c.InsecureHTTP, Resolvers: c.Resolver, Drain: c.Drain, Program: "culvert-gateway/" + version,
		Limits: agent.Limits{Sessions: c.MaxSessions}, Logger: c.logger(),
	}
	if len(c.Issuer) == 0 {
		c.Issuer = []string{claims.GitHub}
	}
	for _, url := range c.Issuer {
		opts.Issuers = append(opts.Issuers, claims.Issuer{URL: url, JWKSFile: c.JWKSFile[url]})
		delete(c.JWKSFile, url)
	}
	for url := range c.JWKSFile {
		return problem.New(problem.Usage, "--jwks-file names "+url+", which is no --issuer", "name the issuer with --issuer too")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	g, err := agent.Start(ctx, opts)
	if err != nil {
		return err
	}
	if os.Getenv("GOMAXPROCS") == "" {
		cores.Adapt(ctx, g.Carried)
	}
	<-ctx.Done()
	again, stopAgain := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt) // whoever asks twice does not want to wait
	defer stopAgain()
	g.Drain(again)
	return g.Close()
}

func (c *runCmd) logger() *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: problem.LogAttr}
	if c.LogFormat == "text" {
		return slog.New(slog.NewTextHandler(os.Stderr, opts))
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, opts))
}

type versionCmd struct{}

func (versionCmd) Run() error {
	_, err := fmt.Printf("culvert-gateway %s %s/%s %s\n", version, runtime.GOOS, runtime.GOARCH, runtime.Version())
	return err
}

func main() {
	parser := kong.Must(&cli{}, kong.Name("culvert-gateway"), kong.DefaultEnvars("CULVERT"),
		kong.Description("Carries CI jobs into a private network, each as far as its grant."))
	ctx, err := parser.Parse(os.Args[1:])
	if err != nil {
		err = problem.Wrap(err, problem.Usage, err.Error(), "see culvert-gateway --help")
	} else if err = ctx.Run(); err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "culvert-gateway:", err)
	os.Exit(problem.CodeOf(err).Exit())
}
