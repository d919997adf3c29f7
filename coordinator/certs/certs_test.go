package certs

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
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

// Files that were refused and are as they were again are said to be good, also where nobody connects.
func TestCertificateThatIsGoodAgain(t *testing.T) {
	dir := t.TempDir()
	certstest.Write(t, dir, "one")
	file := filepath.Join(dir, "c.pem")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	c, err := Load(file, filepath.Join(dir, "k.pem"), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		content []byte
		want    string // what is logged, once
	}{{[]byte("rubbish"), "is refused"}, {good, "good again"}} {
		if err := os.WriteFile(file, step.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, info.ModTime(), info.ModTime()); err != nil { // as a tool that keeps times leaves it
			t.Fatal(err)
		}
		log.Reset()
		c.Look()
		c.Look()
		if strings.Count(log.String(), step.want) != 1 || strings.Count(log.String(), "\n") != 1 {
			t.Errorf("logged %q, want %q once", log.String(), step.want)
		}
	}
	if pair, err := c.Get(nil); err != nil || pair.Leaf.Subject.CommonName != "one" {
		t.Errorf("serves %v, %v", pair, err)
	}
}

func TestNoCertificate(t *testing.T) {
	if _, err := Load("missing.pem", "missing.pem", slog.New(slog.DiscardHandler)); problem.CodeOf(err) != problem.BadConfig {
		t.Errorf("got %v", err)
	}
}
