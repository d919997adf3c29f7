package control

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// other runs this test binary as another user.
func other(t *testing.T, environ ...string) *exec.Cmd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	// The test binary lies in a folder that only root may enter.
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/tmp/culvert-control-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	if err := os.WriteFile(path, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(path) })
	cmd := exec.Command(path)
	cmd.Dir = "/"
	cmd.Env = append([]string{"HOME=/"}, environ...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return cmd
}

func TestOtherUsersAreTurnedAway(t *testing.T) {
	name := unique(t)
	cmd := other(t, asClient+"="+name)
	serve(t, name)
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != string(problem.NeedsPrivilege) {
		t.Errorf("another user got %q, %v", out, err)
	}
}

func TestWhoCalledSudoIsServed(t *testing.T) {
	name := unique(t)
	cmd := other(t, asClient+"="+name)
	t.Setenv("SUDO_UID", "65534")
	serve(t, name)
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != "S" {
		t.Errorf("the user got %q, %v", out, err)
	}
}

func TestImpostorsAreNotBelieved(t *testing.T) {
	name := unique(t)
	cmd := other(t)
	cmd.Env = append(cmd.Env, asServer+"="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "serving\n" {
		t.Fatalf("%q, %v", line, err)
	}
	// Root finds the other user's socket under that user's name alone, and does not look there unless sudo names the user.
	if _, err := client(t, name).Status(context.Background()); problem.CodeOf(err) != problem.NotUp {
		t.Errorf("root believes another user's tunnel: %v", err)
	}
	t.Setenv("SUDO_UID", "65534")
	if _, err := client(t, name).Status(context.Background()); err != nil {
		t.Errorf("sudo culvert status: %v", err)
	}
}
