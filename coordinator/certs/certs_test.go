package certs

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/certs/certstest"
	"github.com/culvertnet/culvert/internal/problem"
)

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certstest.Write(t, dir, "one")
	c, err := Load(filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	name := func() string {
		c.looked = time.Time{} // as if a second had passed
		pair, err := c.Get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.Subject.CommonName
	}
	if got := name(); got != "one" {
		t.Fatalf("serves %q", got)
	}
	touch := func(at time.Time) {
		for _, f := range []string{"c.pem", "k.pem"} {
			if err := os.Chtimes(filepath.Join(dir, f), at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	certstest.Write(t, dir, "two")
	touch(time.Now().Add(time.Minute))
	if got := name(); got != "two" {
		t.Errorf("serves %q after the change", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "c.pem"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	touch(time.Now().Add(2 * time.Minute))
	if got := name(); got != "two" {
		t.Errorf("serves %q after a broken change", got)
	}
	certstest.Write(t, dir, "three")
	touch(time.Now().Add(3 * time.Minute))
	if got := name(); got != "three" {
		t.Errorf("serves %q after it was mended", got)
	}
}

func TestNoCertificate(t *testing.T) {
	if _, err := Load("missing.pem", "missing.pem", slog.New(slog.DiscardHandler)); problem.CodeOf(err) != problem.BadConfig {
		t.Errorf("got %v", err)
	}
}
