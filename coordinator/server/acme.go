package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"

	"golang.org/x/crypto/acme/autocert"

	"github.com/culvertnet/culvert/coordinator/certs"
	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
)

// Bounds on the plain listener, which strangers reach as well. A CA asks once from each of a few places.
const (
	maxChallengers = 256 // connections
	challengeRate  = 10  // requests a second from one address, and at once
	challengeBurst = 100
	challengers    = 1 << 14 // addresses that are remembered
)

// certificate gives the HTTP server what it proves with who it is: files, or what a CA gives. Without either it stays plain.
func (s *Server) certificate() error {
	switch {
	case s.config.TLS != nil:
		files, err := certs.Load(s.config.TLS.Cert, s.config.TLS.Key, s.log)
		if err != nil {
			return err
		}
		s.certs = files
		s.http.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: files.Get, NextProtos: []string{"h2", "http/1.1"}}
	case s.config.ACME != nil:
		u, err := url.Parse(s.config.URL)
		if err != nil {
			return fmt.Errorf("parse the public URL: %w", err)
		}
		c := s.config.ACME
		s.acme, err = certs.NewACME(certs.ACMEOptions{
			Host: u.Hostname(), Email: c.Email, Directory: c.Directory, Roots: c.Roots, Cache: &sharedCache{s.store}, Logger: s.log,
		})
		if err != nil {
			return err
		}
		s.http.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.acme.Get, NextProtos: s.acme.Protos()}
	}
	return nil
}

// openACME has the certificate obtained while run lasts, and answers HTTP-01 challenges where there is a listener for them.
func (s *Server) openACME(ctx, run context.Context) error {
	if s.acme == nil {
		return nil
	}
	if addr := s.config.ACME.HTTP; addr != "" {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			return problem.Wrap(err, problem.Failed, fmt.Sprintf("cannot listen on TCP %s for the CA: %v", addr, problem.Reason(err)), "choose another address for acme.http, or stop what holds this one")
		}
		s.plain = &http.Server{
			Handler: slowly(s.acme.Challenges(s.config.URL)), ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, WriteTimeout: headerTimeout,
			IdleTimeout: headerTimeout, MaxHeaderBytes: 8 << 10,
		}
		bounded := limit.NewListener(l, limit.ConnOptions{Open: maxChallengers, OpenAddr: maxChallengers / 4})
		s.wg.Go(func() {
			if err := s.plain.Serve(bounded); !errors.Is(err, http.ErrServerClosed) {
				s.log.Error("the listener for the CA broke", "addr", addr, "err", err)
			}
		})
	}
	s.wg.Go(func() { s.acme.Obtain(run) })
	return nil
}

// slowly bounds what one address may ask of the plain listener: a challenge is looked up in the state that joins need.
func slowly(next http.Handler) http.Handler {
	limits := limit.New[netip.Prefix](challengeRate, challengeBurst, challengers)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _ := netip.ParseAddrPort(r.RemoteAddr)
		if !limits.Allow(limit.Source(from.Addr())) {
			w.Header().Set("Connection", "close")
			http.Error(w, "too many requests", http.StatusTooManyRequests)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) closeChallenges() error {
	if s.acme != nil {
		s.acme.Close()
	}
	if s.plain != nil {
		return s.plain.Close()
	}
	return nil
}

// sharedCache keeps what ACME has to remember in the state: account, certificate, and answers to challenges, which then any node
// can give.
type sharedCache struct{ store *state.Store }

func (c *sharedCache) name(key string) string { return "acme/" + key }

// Get is autocert's.
func (c *sharedCache) Get(ctx context.Context, key string) ([]byte, error) {
	data, err := c.store.Secret(ctx, c.name(key))
	if errors.Is(err, state.ErrNotFound) {
		return nil, autocert.ErrCacheMiss
	}
	return data, err
}

// Put is autocert's.
func (c *sharedCache) Put(ctx context.Context, key string, data []byte) error {
	return c.store.PutSecret(ctx, c.name(key), data)
}

// Delete is autocert's.
func (c *sharedCache) Delete(ctx context.Context, key string) error {
	return c.store.DropSecret(ctx, c.name(key))
}
