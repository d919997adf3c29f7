// Package certs serves a TLS certificate from files.
package certs

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// certEvery is how often the certificate's files are looked at, at most.
const certEvery = time.Second

// Files serves a certificate from files and takes a new one up when they change. A broken pair is refused and the old one
// stays.
type Files struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	stamps  [2]stamp
	refused bool // the files were no good when they were last read
	looked  time.Time
}

type stamp struct {
	mtime time.Time
	size  int64
}

// Load reads a certificate chain and its key, both PEM. The error is a *problem.Error with code bad-config.
func Load(cert, key string, log *slog.Logger) (*Files, error) {
	c := &Files{cert: cert, key: key, log: log}
	if err := c.load(); err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot use the certificate: %v", err),
			"give tls.cert a PEM file with the chain and tls.key its key")
	}
	return c, nil
}

// Get is tls.Config.GetCertificate.
func (c *Files) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) >= certEvery {
		c.refresh()
	}
	return c.current, nil
}

// Look takes a changed certificate up, or says that it is refused, also where nobody connects.
func (c *Files) Look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
}

// refresh reads the files if they have changed; mu is held.
func (c *Files) refresh() {
	if c.look() == c.stamps {
		return
	}
	if err := c.load(); err != nil {
		c.refused = true
		c.log.Error("the changed certificate is refused and the old one stays in use", "file", c.cert, "key_file", c.key, "err", err,
			"next", "put a PEM file with the chain and one with its key there; they are read again when they change")
		return
	}
	said := "the changed certificate is in use"
	if c.refused {
		said = "the certificate's files are good again, and in use"
	}
	c.refused = false
	c.log.Info(said, "file", c.cert, "expires", c.current.Leaf.NotAfter)
}

// look gives the files' times and sizes, zero for one that is away.
func (c *Files) look() (out [2]stamp) {
	c.looked = time.Now()
	for i, file := range []string{c.cert, c.key} {
		if info, err := os.Stat(file); err == nil {
			out[i] = stamp{info.ModTime(), info.Size()}
		}
	}
	return out
}

// load reads the pair. Its stamps are taken before, so that a change in between is seen next time.
func (c *Files) load() error {
	c.stamps = c.look()
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return err
	}
	c.current = &pair
	return nil
}
