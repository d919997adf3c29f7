package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/health"
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
	at, transport := nearest(cfg)
	word, err := health.Ask(context.Background(), health.Question{
		Program: "coordinator", Base: at, Transport: transport, Ready: c.Ready, Next: "see whether it runs, and with this file",
	})
	if err == nil {
		fmt.Println(word)
	}
	return err
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

// local is [health.Local] of an address that was checked when the file was read.
func local(listen string) string {
	addr, err := health.Local(listen)
	if err != nil {
		return listen
	}
	return addr
}
