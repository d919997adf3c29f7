package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

func writeFile(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func validOptions(t testing.TB) Options {
	return Options{
		Coordinator: coordinatorURL + "/", Network: "corp", Owners: []string{ownerID}, EnrolTokenFile: writeFile(t, "secret\n"),
	}
}

// TestFlowsLeaveFiles: the flows of all jobs together leave a process half of the files that it may have open.
func TestFlowsLeaveFiles(t *testing.T) {
	for files, want := range map[int]int{1024: 512, 20_000: 10_000, 131_072: 65_536, 1 << 20: 65_536} {
		if got := flowsWithin(files); got != want {
			t.Errorf("%d files: %d flows, want %d", files, got, want)
		}
	}
	o := validOptions(t)
	if err := o.Validate(); err != nil || o.Limits.Forward.TotalFlows != flowsWithin(tunnel.Descriptors()) {
		t.Errorf("%d flows, %v", o.Limits.Forward.TotalFlows, err)
	}
	o.Limits.Forward.TotalFlows = 7
	if err := o.Validate(); err != nil || o.Limits.Forward.TotalFlows != 7 {
		t.Errorf("%d flows, %v, want what was said", o.Limits.Forward.TotalFlows, err)
	}
}

func TestOptionsDefaults(t *testing.T) {
	o := validOptions(t)
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	if o.Coordinator != coordinatorURL || o.Listen != ":51820" || o.Name == "" || len(o.Issuers) != 1 ||
		o.client() == nil || o.Limits.Sessions != 20000 {
		t.Errorf("defaults: %+v", o)
	}
	if o.stunFallback() != "culvert.example.com" {
		t.Errorf("fallback for STUN is %q", o.stunFallback())
	}
}

func TestOptionsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Options)
		says   string
	}{
		"no pins":        {func(o *Options) { o.Owners = nil }, "not told whose jobs"},
		"negative limit": {func(o *Options) { o.Limits.Sessions = -1 }, "negative"},
		"owner of no issuer": {func(o *Options) {
			o.Issuers = []claims.Issuer{{URL: "https://a.example"}, {URL: "https://b.example"}}
		}, "whose owner it means"},
		"owner by name":          {func(o *Options) { o.Owners = []string{"acme"} }, "no numeric id"},
		"owner zero":             {func(o *Options) { o.Owners = []string{"0"} }, "no numeric id"},
		"owner with a sign":      {func(o *Options) { o.Owners = []string{"+1"} }, "no numeric id"},
		"empty owner":            {func(o *Options) { o.Owners = []string{""} }, "no numeric id"},
		"no coordinator":         {func(o *Options) { o.Coordinator = "" }, "no coordinator"},
		"coordinator not a URL":  {func(o *Options) { o.Coordinator = "culvert.example.com" }, "not one of the form"},
		"coordinator with query": {func(o *Options) { o.Coordinator += "?x=1" }, "not one of the form"},
		"coordinator with user":  {func(o *Options) { o.Coordinator = "https://a:b@example.com" }, "not one of the form"},
		"coordinator by ftp":     {func(o *Options) { o.Coordinator = "ftp://example.com" }, "scheme"},
		"plain HTTP":             {func(o *Options) { o.Coordinator = "http://example.com" }, "plain HTTP"},
		"no network":             {func(o *Options) { o.Network = "" }, "no network"},
		"no credential":          {func(o *Options) { o.EnrolTokenFile = "" }, "exactly one credential"},
		"two credentials":        {func(o *Options) { o.IdentityTokenFile = o.EnrolTokenFile }, "exactly one credential"},
		"credential missing":     {func(o *Options) { o.EnrolTokenFile += "x" }, "cannot be read"},
		"credential empty":       {func(o *Options) { o.EnrolTokenFile = writeFile(t, "\n") }, "one token on one line"},
		"credential of lines":    {func(o *Options) { o.EnrolTokenFile = writeFile(t, "a\nb") }, "one token on one line"},
		"credential huge":        {func(o *Options) { o.EnrolTokenFile = writeFile(t, strings.Repeat("a", wire.MaxToken+1)) }, "larger than"},
		"listen on one address":  {func(o *Options) { o.Listen = "192.0.2.1:51820" }, "not a port on all addresses"},
		"listen without a port":  {func(o *Options) { o.Listen = "51820" }, "not a port on all addresses"},
		"listen port too large":  {func(o *Options) { o.Listen = ":65536" }, "not a port on all addresses"},
		"public without a port":  {func(o *Options) { o.PublicAddress = netip.MustParseAddrPort("192.0.2.1:0") }, "cannot be reached"},
		"public loopback":        {func(o *Options) { o.PublicAddress = netip.MustParseAddrPort("127.0.0.1:5") }, "cannot be reached"},
	} {
		t.Run(name, func(t *testing.T) {
			o := validOptions(t)
			c.change(&o)
			err := o.Validate()
			if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want bad-config with %q", err, c.says)
			}
			if p := problem.From(err); p.Next == "" {
				t.Error("no next step")
			}
		})
	}
}

func TestOptionsAccepted(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"loopback over HTTP": func(o *Options) { o.Coordinator = "http://127.0.0.1:8080" },
		"localhost":          func(o *Options) { o.Coordinator = "http://localhost:8080" },
		"insecure":           func(o *Options) { o.Coordinator, o.InsecureHTTP = "http://example.com", true },
		"policy alone":       func(o *Options) { o.Owners, o.PolicyFile = nil, "rules.yaml" },
		"all addresses":      func(o *Options) { o.Listen = "0.0.0.0:0" },
		"identity token":     func(o *Options) { o.IdentityTokenFile, o.EnrolTokenFile = o.EnrolTokenFile, "" },
	} {
		t.Run(name, func(t *testing.T) {
			o := validOptions(t)
			change(&o)
			if err := o.Validate(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCredentialIsReadAnew(t *testing.T) {
	o := validOptions(t)
	o.IdentityTokenFile, o.EnrolTokenFile = o.EnrolTokenFile, ""
	for _, token := range []string{"first", "second"} {
		if err := os.WriteFile(o.IdentityTokenFile, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := o.credential()
		if err != nil || got.Reveal() != "Bearer "+token {
			t.Errorf("got %q, %v", got.Reveal(), err)
		}
	}
}

func TestKeyStaysOverRestarts(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	dir := filepath.Join(t.TempDir(), "state")
	first, err := loadKey(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, keyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key file: %v, %v", info.Mode(), err)
	}
	second, err := loadKey(dir, log)
	if err != nil || second.Public() != first.Public() {
		t.Errorf("another key after a restart: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.*.*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	memory, err := loadKey("", log)
	if err != nil || memory.Public() == first.Public() {
		t.Errorf("without a folder: %v", err)
	}
}

func TestBrokenKeyIsNotReplaced(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "short": "AAAA\n", "no base64": strings.Repeat("!", 44), "huge": strings.Repeat("A", 300)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, keyFile)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := loadKey(dir, slog.New(slog.DiscardHandler))
			if problem.CodeOf(err) != problem.BadConfig {
				t.Fatalf("got %v", err)
			}
			if text != "" && strings.Contains(err.Error(), strings.TrimSpace(text)) {
				t.Error("the error quotes the key")
			}
			if kept, _ := os.ReadFile(file); string(kept) != text {
				t.Error("the file was changed")
			}
		})
	}
}
