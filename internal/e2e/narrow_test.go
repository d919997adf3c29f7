//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// From the first moment on nothing is lost behind a link that swallows what is too big and says nothing: each datagram comes back, in
// fragments if need be, and a download that begins at once gets on. With 20 ms of delay, what fits is found out only
// later.
func TestNarrowFromTheFirstPacket(t *testing.T) {
	for _, delay := range []time.Duration{0, 20 * time.Millisecond} {
		t.Run(fmt.Sprintf("delay-%v", delay), func(t *testing.T) {
			link := lab.Link{MTU: 1400, Delay: delay}
			s := setup(t, stage.Options{Runner: lab.NATOptions{Link: link}, Gateway: lab.NATOptions{Link: link}})
			job := newJob(t, s, stage.JobOptions{})
			up(t, job, "tun")
			datagrams(t, s)
			culvert(t, job, 0, "down")
			up(t, newJob(t, s, stage.JobOptions{}), "tun")
			bulk(t, s)
		})
	}
}

// datagrams sends twenty within the first 200 ms and wants all back.
func datagrams(t *testing.T, s *stage.Stage) {
	t.Helper()
	conn, err := s.Runner.Dial(timeout(t, 30*time.Second), "udp", s.Target(stage.PortEcho))
	must(t, err)
	defer conn.Close()
	sent := map[string]bool{}
	for i := range 20 {
		datagram := fmt.Sprintf("%02d", i) + strings.Repeat("x", 1300+i*5) // 1,330 to 1,425 bytes with headers
		sent[datagram] = true
		_, err := conn.Write([]byte(datagram))
		must(t, err)
		time.Sleep(10 * time.Millisecond) // spreads them over the search
	}
	collect(t, conn, sent)
}

// collect reads until everything that was sent is back.
func collect(t *testing.T, conn net.Conn, sent map[string]bool) {
	t.Helper()
	buf := make([]byte, 2000)
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for len(sent) > 0 {
		n, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			var lost []string
			for d := range sent {
				lost = append(lost, fmt.Sprintf("%s of %d bytes", d[:2], len(d)))
			}
			t.Fatalf("%d of 20 datagrams are lost: %s", len(lost), strings.Join(lost, ", "))
		}
		must(t, err)
		delete(sent, string(buf[:n]))
	}
}
