// Package health asks a program that runs on this machine how it is: the health check of an image without a shell.
package health

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

const (
	patience = 4 * time.Second // less than a health check's own limit
	most     = 1024            // bytes of an answer that are shown
)

// Question is to a program that serves /healthz and /readyz.
type Question struct {
	Program   string          // "gateway": for messages
	Base      string          // URL without a path
	Transport *http.Transport // leads there, and uses no proxy; its idle connections are closed
	Ready     bool            // asks whether it is of use, too, and not only whether it lives
	Next      string          // what to do where nobody answers
}

// Ask gives the program's own word. Errors: [problem.Unreachable] where nobody answers, else what the program says is wrong.
func Ask(ctx context.Context, q Question) (string, error) {
	path := "/healthz"
	if q.Ready {
		path = "/readyz"
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	defer q.Transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, q.Base+path, nil)
	if err != nil {
		return "", fmt.Errorf("ask the %s: %w", q.Program, err)
	}
	answer, err := q.Transport.RoundTrip(req)
	if err != nil {
		return "", problem.Wrap(err, problem.Unreachable, fmt.Sprintf("no %s answers on this machine: %v", q.Program, err), q.Next)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return "", problem.Read(answer)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, most))
	if err != nil {
		return "", problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the %s broke off its answer: %v", q.Program, err), q.Next)
	}
	return strings.TrimSpace(string(text)), nil
}

// Local gives where to ask for what listens on an address, host and port: the loopback where that is every address of the machine.
func Local(listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", err
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}
