//go:build unix

package stage

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Client is an HTTP client on a host that trusts the stage's authority. It takes the host's proxy for HTTPS, as programs do.
func (s *Stage) Client(h *lab.Host, timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{
		DialContext: h.Dial,
		Proxy: func(r *http.Request) (*url.URL, error) {
			if r.URL.Scheme != "https" {
				return nil, nil
			}
			return s.proxies[h], nil
		},
		TLSClientConfig:   &tls.Config{RootCAs: s.ca.pool, MinVersion: tls.VersionTLS12},
		DisableKeepAlives: true,
	}}
}

// Join asks the coordinator for a session as a client does, and gives its problem as an error.
func (s *Stage) Join(ctx context.Context, req wire.JoinRequest) (wire.Session, error) {
	var session wire.Session
	err := s.Call(ctx, http.MethodPost, wire.PathSessions, "", req, &session)
	return session, err
}

// Call makes one request to the coordinator's API from the runner. A problem document becomes the error.
func (s *Stage) Call(ctx context.Context, method, path string, secret wire.Secret, body, answer any) error {
	return s.callFrom(ctx, s.Runner, method, path, secret, body, answer)
}

func (s *Stage) callFrom(ctx context.Context, h *lab.Host, method, path string, secret wire.Secret, body, answer any) error {
	var encoded bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&encoded).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, &encoded)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if secret != "" {
		req.Header.Set("Authorization", "Bearer "+secret.Reveal())
	}
	resp, err := s.Client(h, 20*time.Second).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return problem.Read(resp)
	}
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		return fmt.Errorf("read the coordinator's answer: %w", err)
	}
	return nil
}

// Claims are those of a job that the default rule admits, with changes (nil deletes one).
func Claims(changes map[string]any) map[string]any {
	all := map[string]any{
		"repository": Repository, "repository_id": "4711", "repository_owner": "acme", "repository_owner_id": OwnerID,
		"ref": "refs/heads/main", "environment": "production", "workflow": "deploy", "actor": "alice",
	}
	for name, value := range changes {
		all[name] = value
	}
	return all
}

// tryJoin opens a session that the default rule admits and ends it again: it works once a gateway takes sessions.
func (s *Stage) tryJoin(ctx context.Context) error {
	key, err := wire.NewPrivateKey()
	if err != nil {
		return err
	}
	token := s.Issuer.Sign(wire.Audience(s.URL, key.Public()), Claims(nil))
	session, err := s.Join(ctx, wire.JoinRequest{Network: Network, Key: key.Public(), Token: wire.Secret(token)})
	if err != nil {
		return err
	}
	return s.Call(ctx, http.MethodDelete, wire.PathSessions+"/"+session.ID, session.Secret, nil, nil)
}
