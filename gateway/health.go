package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// healthCmd asks a gateway that runs on this machine how it is: the health check of an image without a shell.
type healthCmd struct {
	Metrics string `default:"127.0.0.1:9091" placeholder:"ADDR" help:"Where the gateway serves its metrics."`
	Ready   bool   `help:"Ask whether it is connected to its coordinator, too."`
}

// Run prints the gateway's own word and fails unless that is good.
func (c *healthCmd) Run() error {
	addr, err := local(c.Metrics)
	if err != nil {
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("--metrics %q: %v", c.Metrics, err), "give the address that the gateway was given")
	}
	path := "/healthz"
	if c.Ready {
		path = "/readyz"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return fmt.Errorf("ask the gateway: %w", err)
	}
	// No proxy: the gateway asked is on this machine.
	answer, err := (&http.Transport{}).RoundTrip(req)
	if err != nil {
		return problem.Wrap(err, problem.Unreachable, "no gateway answers at "+addr, "see whether it runs, and with which --metrics")
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return problem.Read(answer)
	}
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 256))
	fmt.Println(strings.TrimSpace(string(text)))
	return nil
}

// local gives where to ask for what listens on an address: the loopback where that is every address of the machine.
func local(listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", err
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}
