//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/stage"
)

// A runner's memory is the job's, and what it downloads costs time: the limits that the client has to keep.
func TestTheClientIsSmall(t *testing.T) {
	const mostMemory, mostSize = 40, 8 // MB
	if os.Getenv(ownedEnv) != "" {
		t.Skip("the programs are not built as a release's are")
	}
	s := setup(t, stage.Options{})
	if size := packed(t, s.Binary("culvert")); size > mostSize {
		t.Errorf("a release's client has %.1f MB, more than %d", size, mostSize)
	}
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	var status struct {
		PID int `json:"pid"`
	}
	must(t, json.Unmarshal([]byte(culvert(t, job, 0, "status", "--json").Stdout), &status))
	eventually(t, 30*time.Second, "an idle client", func() error {
		if used := residentMemory(t, status.PID); used > mostMemory {
			return fmt.Errorf("it takes %.1f MB", used)
		}
		return nil
	})
}
