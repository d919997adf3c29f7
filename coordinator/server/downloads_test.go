package server

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

// TestDownloads: a coordinator serves the releases that its operator has put into a folder, and a reload says which folder that is.
func TestDownloads(t *testing.T) {
	r := newRigOf(t, Options{}, func(doc string) string { return doc + "downloads: releases\n" },
		"releases/v1.2.3/culvert-linux-amd64.gz", "the client", "releases/v1.2.3/secret.txt", "secret", "others/v2.0.0/culvert-linux-arm64.gz", "the next")
	resp, body := r.fetch(t, "/dl/v1.2.3/culvert-linux-amd64.gz")
	if resp.StatusCode != http.StatusOK || body != "the client" || resp.Header.Get("ETag") == "" || resp.Header.Get("Cache-Control") == "no-store" {
		t.Errorf("%s %q %v", resp.Status, body, resp.Header)
	}
	if resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%v", resp.Header)
	}
	for _, path := range []string{"/dl/", "/dl/v1.2.3", "/dl/v1.2.3/", "/dl/v1.2.3/secret.txt", "/dl/v1.2.3/%2e%2e%2fculvert.yaml", "/dl/../culvert.yaml",
		"/dl/%2e%2e/culvert.yaml", "/dl/v2.0.0/culvert-linux-arm64.gz"} {
		resp, body := r.fetch(t, path)
		if resp.StatusCode != http.StatusNotFound || !strings.Contains(resp.Header.Get("Content-Type"), problem.MediaType) || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %s %q %v", path, resp.Status, body, resp.Header)
		}
	}
	r.write(strings.Replace(r.doc, "downloads: releases", "downloads: others", 1))
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if resp, body := r.fetch(t, "/dl/v2.0.0/culvert-linux-arm64.gz"); body != "the next" {
		t.Errorf("after a reload: %s %q", resp.Status, body)
	}
}

func (r *rig) fetch(t *testing.T, path string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}
