//go:build unix

package stage

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"os/exec"

	"github.com/culvertnet/culvert/internal/lab"
)

// ProxyProgram is the HTTP proxy that [lab.OnlyProxy] needs.
const ProxyProgram = "tinyproxy"

const (
	proxyPort = 8888
	proxyUser = "job"
)

// startProxies starts a proxy in each network that has no other way out.
func (s *Stage) startProxies(ctx context.Context) error {
	if s.opts.Flat {
		return nil
	}
	s.proxies = map[*lab.Host]*url.URL{}
	for i, side := range []struct {
		kind lab.Kind
		host *lab.Host
	}{{s.opts.Runner.Kind, s.Runner}, {s.opts.Gateway.Kind, s.GatewayBox}} {
		if !side.kind.Is(lab.OnlyProxy) {
			continue
		}
		proxy, err := s.startProxy(ctx, "proxy-"+side.host.Name(), s.NATs[i])
		if err != nil {
			return fmt.Errorf("start a proxy for the %s: %w", side.host.Name(), err)
		}
		s.proxies[side.host] = proxy
	}
	return nil
}

// startProxy starts a proxy behind a NAT and gives its URL, password included.
func (s *Stage) startProxy(ctx context.Context, name string, nat *lab.NAT) (*url.URL, error) {
	program, err := exec.LookPath(ProxyProgram)
	if err != nil {
		return nil, err
	}
	host, err := s.Net.Host(name, lab.HostOptions{Behind: nat, Proxy: true})
	if err != nil {
		return nil, err
	}
	at := netip.AddrPortFrom(host.Addr(), proxyPort).String()
	password := rand.Text()
	config := fmt.Sprintf("Listen %s\nPort %d\nTimeout 600\nMaxClients 100\nConnectPort 443\nBasicAuth %s %s\nLogLevel Warning\n",
		host.Addr(), proxyPort, proxyUser, password)
	if err := os.WriteFile(s.file(name+".conf"), []byte(config), 0o644); err != nil { // a password of this minute and this lab alone
		return nil, err
	}
	proc, err := s.daemon(host, name, lab.Program{Path: program, Args: []string{"-d", "-c", s.file(name + ".conf")}, Unprivileged: true})
	if err != nil {
		return nil, err
	}
	err = poll(ctx, proc.Done(), func() error {
		conn, err := host.Dial(ctx, "tcp", at)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return &url.URL{Scheme: "http", User: url.UserPassword(proxyUser, password), Host: at}, err
}
