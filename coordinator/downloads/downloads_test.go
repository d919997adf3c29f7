package downloads

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

const (
	version = "v1.2.3"
	client  = "culvert-linux-amd64.gz"
)

// folder is one with a release, and with what must never be served.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(outside, []byte("secret"), 0o600))
	must(t, os.MkdirAll(filepath.Join(dir, version), 0o755))
	for name, content := range map[string]string{client: "the client", "notes.txt": "secret", "culvert-gateway-linux-amd64.tar.gz": "the gateway", "../" + client: "secret"} {
		must(t, os.WriteFile(filepath.Join(dir, version, name), []byte(content), 0o600))
	}
	must(t, os.Symlink(outside, filepath.Join(dir, version, "culvert-linux-arm64.gz")))
	must(t, os.Mkdir(filepath.Join(dir, version, "culvert-darwin-arm64.gz"), 0o755))
	large, err := os.Create(filepath.Join(dir, version, "culvert-windows-amd64.gz"))
	must(t, err)
	must(t, large.Truncate(MaxSize+1)) // sparse
	must(t, large.Close())
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ask asks a handler; a problem becomes its status and code.
func ask(h *Handler, release, file string, header http.Header) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/dl/x/y", nil)
	r.Header = header
	if err := h.Serve(w, r, source(0), release, file); err != nil {
		w.Code = problem.CodeOf(err).Status()
	}
	return w
}

func source(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 32)
}

func handler(dir string) *Handler {
	return New(func() string { return dir }, slog.New(slog.DiscardHandler))
}

func TestServesAReleaseWithItsDigest(t *testing.T) {
	h := handler(folder(t))
	sum := sha256.Sum256([]byte("the client"))
	tag := `"` + hex.EncodeToString(sum[:]) + `"`
	for range 2 { // computed, then remembered
		w := ask(h, version, client, nil)
		if w.Code != http.StatusOK || w.Body.String() != "the client" || w.Header().Get("ETag") != tag {
			t.Fatalf("%d, %q, %v", w.Code, w.Body, w.Header())
		}
		if got := w.Header().Get("Cache-Control"); got != "public, max-age=3600" || w.Header().Get("Content-Encoding") != "" {
			t.Errorf("%v", w.Header())
		}
	}
	if w := ask(h, version, client, http.Header{"If-None-Match": {tag}}); w.Code != http.StatusNotModified || w.Body.Len() != 0 {
		t.Errorf("unchanged: %d, %q", w.Code, w.Body)
	}
	if w := ask(h, version, client, http.Header{"Range": {"bytes=4-"}}); w.Code != http.StatusPartialContent || w.Body.String() != "client" {
		t.Errorf("the rest: %d, %q", w.Code, w.Body)
	}
	if w := ask(h, version, "culvert-gateway-linux-amd64.tar.gz", nil); w.Body.String() != "the gateway" {
		t.Errorf("the gateway: %d", w.Code)
	}
}

func TestAChangedFileHasAnotherTag(t *testing.T) {
	dir := folder(t)
	h := handler(dir)
	before := ask(h, version, client, nil).Header().Get("ETag")
	name := filepath.Join(dir, version, client)
	must(t, os.WriteFile(name, []byte("another one"), 0o600))
	w := ask(h, version, client, http.Header{"If-None-Match": {before}})
	if w.Code != http.StatusOK || w.Body.String() != "another one" || w.Header().Get("ETag") == before {
		t.Errorf("%d, %q, %v", w.Code, w.Body, w.Header())
	}
}

// Nothing but a release's files can be had, whatever lies in the folder and however it is asked for.
func TestServesNothingElse(t *testing.T) {
	dir := folder(t)
	for name, asked := range map[string][2]string{
		"another file":         {version, "notes.txt"},
		"a folder":             {version, "culvert-darwin-arm64.gz"},
		"a link to outside":    {version, "culvert-linux-arm64.gz"},
		"a file too large":     {version, "culvert-windows-amd64.gz"},
		"no such release":      {"v9.9.9", client},
		"the folder above":     {"..", client},
		"a path in the file":   {version, "../" + client},
		"a path in the name":   {version + "/..", client},
		"backslashes":          {version, `..\` + client},
		"a listing":            {version, ""},
		"no release":           {"", client},
		"a name with a zero":   {version, client + "\x00"},
		"a name with a line":   {version, client + "\n"},
		"an encoded separator": {version, "%2e%2e%2f" + client},
		"a long release":       {"v1.2.3-" + strings.Repeat("x", 33), client},
	} {
		if w := ask(handler(dir), asked[0], asked[1], nil); w.Code != http.StatusNotFound || w.Body.Len() != 0 {
			t.Errorf("%s: %d, %q", name, w.Code, w.Body)
		}
	}
	for name, dir := range map[string]string{"not configured": "", "a folder that is away": filepath.Join(dir, "away")} {
		if w := ask(handler(dir), version, client, nil); w.Code != http.StatusNotFound {
			t.Errorf("%s: %d", name, w.Code)
		}
	}
}

// stuck is a client that takes nothing until it is told to.
type stuck struct {
	*httptest.ResponseRecorder
	began, goOn chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	s.began <- struct{}{}
	<-s.goOn
	return s.ResponseRecorder.Write(p)
}

func TestDownloadsAtOnceAreBounded(t *testing.T) {
	h := handler(folder(t))
	s := stuck{began: make(chan struct{}), goOn: make(chan struct{})}
	done := make(chan struct{})
	begin := func(from, n int) {
		for range n {
			go func() {
				defer func() { done <- struct{}{} }()
				_ = h.Serve(stuck{httptest.NewRecorder(), s.began, s.goOn}, httptest.NewRequest(http.MethodGet, "/", nil), source(from), version, client)
			}()
		}
		for range n {
			<-s.began
		}
	}
	begin(1, MaxEach)
	if h.take(source(1)) {
		t.Error("one address may have them all")
	}
	if w := ask(h, version, client, nil); w.Code != http.StatusOK {
		t.Errorf("while another address reads nothing: %d", w.Code)
	}
	for from := 2; from <= MaxAtOnce/MaxEach; from++ {
		begin(from, MaxEach)
	}
	if w := ask(h, version, client, nil); w.Code != http.StatusServiceUnavailable {
		t.Errorf("one too many: %d", w.Code)
	}
	close(s.goOn)
	for range MaxAtOnce {
		<-done
	}
	if w := ask(h, version, client, nil); w.Code != http.StatusOK || len(h.sources) != 0 {
		t.Errorf("afterwards: %d, %d are counted", w.Code, len(h.sources))
	}
}

func TestDigestsRememberedAreBounded(t *testing.T) {
	dir := folder(t)
	h := handler(dir)
	name := filepath.Join(dir, version, client)
	for i := range maxDigests + 10 {
		at := time.Unix(int64(i+1), 0)
		must(t, os.Chtimes(name, at, at))
		if w := ask(h, version, client, nil); w.Code != http.StatusOK {
			t.Fatalf("%d", w.Code)
		}
	}
	if len(h.digests) > maxDigests {
		t.Errorf("%d digests are remembered", len(h.digests))
	}
}
