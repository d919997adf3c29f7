package state

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"
)

// crashDir names the environment variable that makes the test binary the child of TestKilledProcessLosesNothing.
const crashDir = "CULVERT_TEST_CRASH_DIR"

// crashChild creates leases in dir and prints each once it is acknowledged, until it is killed.
func crashChild(dir string) {
	s := must(Open(context.Background(), Options{Dir: dir, Logger: quiet}))
	out := json.NewEncoder(os.Stdout)
	for i := 0; ; i++ {
		l := must(s.CreateLease(context.Background(), testLease(fmt.Sprint("session-", i), time.Now()), testPool))
		if i%3 == 0 {
			l.Gateway = "gw"
			l.Expires = l.Expires.Add(time.Minute)
			l = must(s.UpdateLease(context.Background(), l))
		}
		if i%5 == 0 {
			if err := s.EndLease(context.Background(), l.Session); err != nil {
				panic(err)
			}
			l.Rules = []string{"ended"}
		}
		if err := out.Encode(l); err != nil {
			panic(err)
		}
	}
}

func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	child := exec.CommandContext(t.Context(), os.Args[0]) //nolint:gosec // this test binary
	child.Env = append(os.Environ(), crashDir+"="+dir)
	child.Stderr = os.Stderr
	out := must(child.StdoutPipe())
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var acknowledged []Lease
	lines := json.NewDecoder(bufio.NewReader(out))
	for {
		var l Lease
		err := lines.Decode(&l)
		if err != nil { // the pipe ends with the child, within a line perhaps
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Error(err)
			}
			break
		}
		acknowledged = append(acknowledged, l)
		if len(acknowledged) == 300 {
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = child.Wait()
	if len(acknowledged) < 300 {
		t.Fatalf("the child ended by itself after %d leases", len(acknowledged))
	}
	checkSurvivors(t, open(t, Options{Dir: dir}), acknowledged)
}

func checkSurvivors(t *testing.T, s *Store, acknowledged []Lease) {
	t.Helper()
	for _, want := range acknowledged {
		got, err := s.Lease(t.Context(), want.Session)
		if want.Rules[0] == "ended" {
			if !errors.Is(err, ErrNotFound) {
				t.Errorf("%s came back: %v", want.Session, err)
			}
			continue
		}
		if err != nil || got.Gateway != want.Gateway || got.Addresses[0] != want.Addresses[0] || !got.Expires.Equal(want.Expires) {
			t.Fatalf("%s is %+v (%v), want %+v", want.Session, got, err, want)
		}
		if _, err := s.CreateLease(t.Context(), want, testPool); !errors.Is(err, ErrExists) {
			t.Errorf("%s was created twice: %v", want.Session, err)
		}
		other := want
		other.Session = "another"
		if _, err := s.AdoptLease(t.Context(), other); !errors.Is(err, ErrExists) {
			t.Errorf("the address of %s was given again: %v", want.Session, err)
		}
		got.Expires = got.Expires.Add(time.Minute)
		if _, err := s.UpdateLease(t.Context(), got); err != nil {
			t.Errorf("%s is not renewed: %v", want.Session, err)
		}
	}
}
