package main

import (
	"context"
	"fmt"
	"net/http"

	"github.com/culvertnet/culvert/internal/health"
	"github.com/culvertnet/culvert/internal/problem"
)

// healthCmd asks a gateway that runs on this machine how it is: the health check of an image without a shell.
type healthCmd struct {
	Metrics string `default:"127.0.0.1:9091" placeholder:"ADDR" help:"Where the gateway serves its metrics."`
	Ready   bool   `help:"Ask whether it is connected to its coordinator, too."`
}

// Run prints the gateway's own word and fails unless that is good.
func (c *healthCmd) Run() error {
	addr, err := health.Local(c.Metrics)
	if err != nil {
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("--metrics %q: %v", c.Metrics, err), "give the address that the gateway was given")
	}
	word, err := health.Ask(context.Background(), health.Question{
		Program: "gateway", Base: "http://" + addr, Transport: &http.Transport{}, Ready: c.Ready,
		Next: "see whether it runs, and with which --metrics",
	})
	if err == nil {
		fmt.Println(word)
	}
	return err
}
