package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// asServer makes the test binary hold a control socket until it is killed; asClient makes it read one's status.
const (
	asServer = "CULVERT_TEST_SERVER"
	asClient = "CULVERT_TEST_CLIENT"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asServer) != "":
		serveForever(os.Getenv(asServer))
	case os.Getenv(asClient) != "":
		readOnce(os.Getenv(asClient))
	}
	goleak.VerifyTestMain(m)
}

func serveForever(name string) {
	s, err := Listen(name, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	s.Serve(&fake{})
	fmt.Println("serving")
	select {}
}

func readOnce(name string) {
	c, err := NewClient(name)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	st, err := c.Status(context.Background())
	fmt.Println(st.Session, problem.CodeOf(err))
	os.Exit(0)
}

// fake is a tunnel.
type fake struct{ downs atomic.Int64 }

func (*fake) Status() Status { return Status{State: Up, Session: "S", Mode: "proxy"} }

func (*fake) Claim() Claim { return Claim{Network: "corp", Job: "r/1"} }

func (*fake) Check(_ context.Context, target string) (wire.ReachResult, error) {
	if target == "" {
		return wire.ReachResult{}, problem.New(problem.Usage, "no target", "name one")
	}
	return wire.ReachResult{Target: target, Verdict: wire.FlowDenied, Reason: "no rule"}, nil
}

func (f *fake) Down(context.Context) error {
	f.downs.Add(1)
	return nil
}

func serve(t *testing.T, name string) *fake {
	t.Helper()
	s, err := Listen(name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{}
	s.Serve(f)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func client(t *testing.T, name string) *Client {
	t.Helper()
	c, err := NewClient(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func unique(*testing.T) string { return fmt.Sprintf("t%d-%d", os.Getpid(), time.Now().UnixNano()%1e9) }

// Tunnels of this user are found by their sockets, and say what they have; the one that asks is not among them.
func TestTunnelsFindEachOther(t *testing.T) {
	own, other := unique(t), unique(t)+"b"
	serve(t, own)
	serve(t, other)
	var found []Claim
	for _, c := range Tunnels(t.Context(), own) {
		if c.Name == own || c.Name == other { // others may run on this machine
			found = append(found, c)
		}
	}
	if len(found) != 1 || found[0].Name != other || found[0].Network != "corp" || found[0].Job != "r/1" {
		t.Errorf("found %+v", found)
	}
}

// What a tunnel covers: addresses in its ranges, names as they are and below wildcards, however they are written.
func TestClaimCovers(t *testing.T) {
	c := Claim{Routes: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, Names: []string{"db.internal", "*.svc.corp"}}
	for host, want := range map[string]bool{
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "10.2.0.1": false, "db.internal": true, "DB.Internal.": true, "x.db.internal": false,
		"a.svc.corp": true, "a.b.svc.corp": true, "svc.corp": false, ".svc.corp": false, "xsvc.corp": false, "": false,
	} {
		if got := c.Covers(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}

// A host belongs to the network whose grant for it is the narrowest.
func TestClosest(t *testing.T) {
	order := []Claim{
		{},
		{Routes: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Names: []string{"*.corp"}},
		{Routes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.3.0.0/16")}, Names: []string{"*.corp", "*.svc.corp"}},
		{Routes: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, Names: []string{"a.svc.corp"}},
	}
	for _, host := range []string{"10.1.2.3", "a.svc.corp"} {
		for i := range order[1:] {
			if wide, narrow := order[i].Closeness(host), order[i+1].Closeness(host); wide >= narrow {
				t.Errorf("%s is %d close to %+v, %d to %+v", host, wide, order[i], narrow, order[i+1])
			}
		}
	}
}

func TestCalls(t *testing.T) {
	name := unique(t)
	f := serve(t, name)
	c, ctx := client(t, name), context.Background()
	st, err := c.Status(ctx)
	if err != nil || st.State != Up || st.Session != "S" {
		t.Errorf("status = %+v, %v", st, err)
	}
	r, err := c.Check(ctx, "10.0.0.1:1")
	if err != nil || r.Verdict != wire.FlowDenied || r.Reason != "no rule" {
		t.Errorf("check = %+v, %v", r, err)
	}
	if _, err = c.Check(ctx, ""); problem.CodeOf(err) != problem.Usage || problem.From(err).Next != "name one" {
		t.Errorf("check of nothing: %v", err)
	}
	if err = c.Down(ctx); err != nil || f.downs.Load() != 1 {
		t.Errorf("down: %v, %d", err, f.downs.Load())
	}
	// The name is free as soon as down has answered.
	serve(t, name)
}

func TestNamesAreUnique(t *testing.T) {
	name := unique(t)
	serve(t, name)
	if _, err := Listen(name, slog.New(slog.DiscardHandler)); problem.CodeOf(err) != problem.AlreadyUp {
		t.Errorf("a second tunnel of the name: %v", err)
	}
}

func TestNotUp(t *testing.T) {
	_, err := client(t, unique(t)).Status(context.Background())
	if problem.CodeOf(err) != problem.NotUp || problem.From(err).Next == "" {
		t.Errorf("error = %v", err)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"culvert": true, "a": true, "a.b-c_d9": true, "": false, "-a": false, ".": false, "a/b": false, "a b": false,
		"../x": false, strings.Repeat("a", 33): false, "ä": false, "a\x00": false,
	} {
		if err := ValidateName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestKilledTunnelLeavesItsNameFree(t *testing.T) {
	name := unique(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asServer+"="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "serving\n" {
		t.Fatalf("%q, %v", line, err)
	}
	c := client(t, name)
	if _, err := c.Status(context.Background()); err != nil {
		t.Errorf("status: %v", err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, err := c.Status(context.Background()); problem.CodeOf(err) != problem.NotUp {
		t.Errorf("status after kill -9: %v", err)
	}
	serve(t, name)
}

func TestGarbageIsRefused(t *testing.T) {
	name := unique(t)
	serve(t, name)
	c := client(t, name)
	resp, err := c.http.Post("http://culvert"+pathCheck, "application/json", strings.NewReader("{"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("status = %s", resp.Status)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
