//go:build unix

package stage

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// reachable gives a folder that other users can enter, which t.TempDir is not.
func reachable(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert-stage-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, file, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func TestPublishCopiesOnlyWhatOthersCannotRun(t *testing.T) {
	s := &Stage{opts: Options{Dir: reachable(t)}}
	open := filepath.Join(reachable(t), "program")
	write(t, open, "open", 0o755)
	if got, err := s.Publish(open); err != nil || got != open {
		t.Errorf("a program that everybody can run: %s, %v", got, err)
	}
	closed := filepath.Join(reachable(t), "home")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	hidden := filepath.Join(closed, "program")
	write(t, hidden, "hidden", 0o755)
	got, err := s.Publish(hidden)
	if err != nil || got == hidden {
		t.Fatalf("a program in a closed folder: %s, %v", got, err)
	}
	if data, err := os.ReadFile(got); err != nil || string(data) != "hidden" {
		t.Errorf("the copy is %q, %v", data, err)
	}
	if _, err := s.Publish(filepath.Join(closed, "missing")); err == nil {
		t.Error("a program that is not there was published")
	}
}

func TestAuthorityServesItsHostsAlone(t *testing.T) {
	good := netip.MustParseAddr("127.0.0.1")
	a, err := newAuthority(t.TempDir(), good)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", a.serverConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake()
			conn.Close()
		}
	}()
	for name, want := range map[string]bool{"127.0.0.1": true, "127.0.0.2": false} {
		dialer := tls.Dialer{
			NetDialer: &net.Dialer{Timeout: 5 * time.Second},
			Config:    &tls.Config{RootCAs: a.pool, ServerName: name, MinVersion: tls.VersionTLS13},
		}
		conn, err := dialer.DialContext(t.Context(), "tcp", l.Addr().String())
		if (err == nil) != want {
			t.Errorf("as %s: %v", name, err)
		}
		if conn != nil {
			conn.Close()
		}
	}
}

func TestEnrolmentHoldsOnlyItsHash(t *testing.T) {
	secret, sum := newEnrolment()
	again, _ := newEnrolment()
	digest := sha256.Sum256([]byte(secret))
	if sum != hex.EncodeToString(digest[:]) || secret == again || len(secret) < 32 {
		t.Errorf("secret of %d characters, hash %s", len(secret), sum)
	}
}

func TestResultFindsItsProblem(t *testing.T) {
	document, err := problem.New(problem.Denied, "no rule lets this job in", "").MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var indented bytes.Buffer
	indented.WriteString("{\n\"detail\": \"no rule lets this job in\",\n\"code\": \"denied\"\n}\n")
	for name, tc := range map[string]struct {
		result Result
		want   bool
	}{
		"on stdout":       {Result{Stdout: string(document) + "\n"}, true},
		"after a log":     {Result{Stderr: "level=WARN msg=again\n" + string(document) + "\n"}, true},
		"indented":        {Result{Stdout: indented.String()}, true},
		"a success":       {Result{Stdout: `{"session":"abc"}`}, false},
		"nothing printed": {Result{}, false},
	} {
		p := tc.result.Problem()
		if (p != nil) != tc.want || (p != nil && p.Code != problem.Denied) {
			t.Errorf("%s: %v", name, p)
		}
	}
}

func TestClaimsTakeChanges(t *testing.T) {
	got := Claims(map[string]any{"ref": "refs/heads/x", "environment": nil})
	if got["ref"] != "refs/heads/x" || got["environment"] != nil || got["repository"] != Repository {
		t.Errorf("%v", got)
	}
	if _, kept := got["environment"]; !kept {
		t.Error("a claim to delete must stay, as nil")
	}
	if Claims(nil)["ref"] == "refs/heads/x" {
		t.Error("changes leak into the default")
	}
}
