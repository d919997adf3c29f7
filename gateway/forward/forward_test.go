package forward

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

// TestDenialsAreLogged: the first denials are logged with their fixed keys, a flood is not, and all are counted.
func TestDenialsAreLogged(t *testing.T) {
	e := newEnv(t, Limits{})
	var log bytes.Buffer
	e.f.log = slog.New(slog.NewTextHandler(&log, nil))
	for i := range 100 {
		e.s.deny(flowKey{policy.TCP, netip.AddrPortFrom(job4, uint16(i)), netip.MustParseAddrPort("10.1.2.3:22")}, judgement{Verdict: policy.Verdict{Reason: "not granted"}})
	}
	if n := e.s.Counts().Denied; n != 100 {
		t.Errorf("%d denials counted", n)
	}
	if n := strings.Count(log.String(), "\n"); n != denialBurst {
		t.Errorf("%d lines for 100 denials", n)
	}
	want := `level=INFO msg="flow denied" session=session-1 code=flow-denied proto=tcp addr=10.1.2.3:22 name="" reason="not granted" suppressed=0`
	if !strings.Contains(log.String(), want) {
		t.Errorf("log: %s", log.String())
	}
}

func TestOptions(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("a forwarder without a device was made")
	}
	d, err := netstack.New(netstack.Options{Forward: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := New(Options{Device: d, Limits: Limits{UDPIdle: -1}}); err == nil {
		t.Error("a negative limit was taken")
	}
	f, err := New(Options{Device: d})
	if err != nil {
		t.Fatal(err)
	}
	if f.limits.SessionFlows != 4096 || f.limits.DialTimeout.Seconds() != 10 {
		t.Errorf("limits: %+v", f.limits)
	}
	for _, addrs := range [][]netip.Addr{nil, {{}}} {
		if _, err := f.Add("s", addrs, new(policy.Scope)); err == nil {
			t.Errorf("addresses %v were taken", addrs)
		}
	}
	if _, err := f.Add("s", []netip.Addr{job4}, nil); err == nil {
		t.Error("a session without a scope was taken")
	}
	f.Close()
	if _, err := f.Add("s", []netip.Addr{job4}, new(policy.Scope)); err == nil {
		t.Error("a closed forwarder took a session")
	}
}

// TestSessionsComeAndGo adds and removes sessions from many goroutines while sources are looked up.
func TestSessionsComeAndGo(t *testing.T) {
	e := newEnv(t, Limits{})
	var work sync.WaitGroup
	for i := range 8 {
		work.Go(func() {
			for j := range 50 {
				a := netip.AddrFrom4([4]byte{198, 18, byte(i + 1), byte(j)})
				s, err := e.f.Add(fmt.Sprint(i, j), []netip.Addr{a}, e.scope)
				if err != nil {
					t.Error(err)
					return
				}
				if e.f.session(a) != s {
					t.Error("a session is not found by its address")
				}
				e.f.Remove(s)
				if e.f.session(a) != nil {
					t.Error("a removed session is still found")
				}
			}
		})
	}
	work.Wait()
}

func TestRejectFor(t *testing.T) {
	for err, want := range map[error]rejection{
		syscall.ECONNREFUSED: none, syscall.ENETUNREACH: netUnreachable, syscall.EHOSTUNREACH: hostUnreachable,
		syscall.ETIMEDOUT: hostUnreachable, syscall.EACCES: prohibited, syscall.EMFILE: none,
	} {
		if got := rejectFor(fmt.Errorf("dial: %w", err)); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
	}
}
