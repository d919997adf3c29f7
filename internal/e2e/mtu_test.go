//go:build linux

package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// Behind a link that swallows what is too big and says nothing, bulk TCP works both ways, and so do datagrams of 1,300 bytes:
// on a direct path, through a relay over UDP and over a WebSocket.
func TestSmallLinks(t *testing.T) {
	for _, tc := range []struct {
		path string
		mtu  uint16
		kind lab.Kind
	}{
		{"direct", 1400, lab.Easy},
		{"relay", 1400, lab.Easy},
		{"websocket", 1400, lab.NoUDP},
	} {
		t.Run(fmt.Sprintf("%s-%d", tc.path, tc.mtu), func(t *testing.T) {
			link := lab.Link{MTU: tc.mtu}
			s := setup(t, stage.Options{Runner: lab.NATOptions{Kind: tc.kind, Link: link}, Gateway: lab.NATOptions{Link: link}})
			if tc.path == "relay" {
				must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
			}
			job := newJob(t, s, stage.JobOptions{})
			up(t, job, "tun")
			if p, _ := waitPath(t, job, time.Minute, func(p path) bool { return p.String() == tc.path }); p.String() != tc.path {
				t.Fatalf("the path is %v, want %s", p, tc.path)
			}
			bulk(t, s)
			echo(t, s)
			bulk(t, s)
		})
	}
}

// bulk brings eight megabytes to the service and eight back.
func bulk(t testing.TB, s *stage.Stage) {
	t.Helper()
	const size = 8 << 20
	sent, err := io.ReadAll(io.LimitReader(rand.NewChaCha8([32]byte([]byte("culvert end-to-end upload 000001"))), size))
	must(t, err)
	sum := sha256.Sum256(sent)
	client := s.Client(s.Runner, time.Minute)
	resp, err := client.Post("http://"+s.Target(stage.PortHTTP)+"/upload", "application/octet-stream", bytes.NewReader(sent))
	must(t, err)
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || string(got) != hex.EncodeToString(sum[:]) {
		t.Fatalf("the upload's checksum is %q, %v", got, err)
	}
	back, err := client.Get("http://" + s.Target(stage.PortHTTP) + "/download")
	must(t, err)
	defer back.Body.Close()
	want := io.LimitReader(download(), size)
	if !equal(want, io.LimitReader(back.Body, size)) || back.StatusCode != http.StatusOK {
		t.Fatal("the download is not what was sent")
	}
}

// equal compares two streams to their end.
func equal(a, b io.Reader) bool {
	ha, hb := sha256.New(), sha256.New()
	na, erra := io.Copy(ha, a)
	nb, errb := io.Copy(hb, b)
	return erra == nil && errb == nil && na == nb && bytes.Equal(ha.Sum(nil), hb.Sum(nil))
}
