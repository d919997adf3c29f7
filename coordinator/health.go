package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
)

// healthCmd asks a coordinator that runs on this machine how it is: the health check of an image without a shell.
type healthCmd struct {
	Config string `default:"/etc/culvert/culvert.yaml" placeholder:"FILE" help:"The configuration that the coordinator was given."`
	Ready  bool   `help:"Ask whether it takes jobs, too."`
}

// Run prints the coordinator's own word and fails unless that is good.
func (c *healthCmd) Run() error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	path := "/healthz"
	if c.Ready {
		path = "/readyz"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	at, transport := nearest(cfg)
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at+path, nil)
	if err != nil {
		return fmt.Errorf("ask the coordinator: %w", err)
	}
	answer, err := transport.RoundTrip(req)
	if err != nil {
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("no coordinator answers on this machine: %v", err), "see whether it runs, and with this file")
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return problem.Read(answer)
	}
	text, _ := io.ReadAll(io.LimitReader(answer.Body, 256))
	fmt.Println(strings.TrimSpace(string(text)))
	return nil
}

// nearest gives where on this machine a coordinator with this configuration answers, and what leads there: its socket, its listener
// for operators, or the public one. No proxy is asked for any of them.
func nearest(cfg *config.Config) (base string, t *http.Transport) {
	t = &http.Transport{}
	if name := cfg.Socket(); name != "" {
		if _, err := os.Stat(name); err == nil {
			t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", name)
			}
			return "http://coordinator", t
		}
	}
	if cfg.Private.Listen != "" {
		return "http://" + local(cfg.Private.Listen), t
	}
	if cfg.TLS == nil {
		return "http://" + local(cfg.Listen), t
	}
	// Whoever listens on this machine's own address is asked how it is, and told nothing: its certificate is for another name.
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	return "https://" + local(cfg.Listen), t
}

// local gives where to ask for what listens on an address: the loopback where that is every address of the machine.
func local(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen // refused when the file was read
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
