package main

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// cloud starts a coordinator that only tells of its STUN ports and of its relay, which are real, and names it in
// CULVERT_COORDINATOR: `cloud`, or `cloud silent` for one that no UDP reaches.
func cloud(t *testing.T, ts *testscript.TestScript, args []string) {
	public, _, err := ed25519.GenerateKey(nil)
	ts.Check(err)
	r, err := relay.New(t.Context(), relay.Options{UDP: "127.0.0.1:0", Probe: "127.0.0.1:0", Keys: []ed25519.PublicKey{public}, Sockets: 1})
	ts.Check(err)
	t.Cleanup(func() { _ = r.Close() })
	udp, probe := r.Addr().Port(), r.ProbeAddr().Port()
	if len(args) == 1 && args[0] == "silent" {
		udp, probe = hole(t, ts), hole(t, ts)
	}
	info := wire.Info{Version: wire.Version, STUN: []string{fmt.Sprintf(":%d", udp), fmt.Sprintf(":%d", probe)}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathInfo, func(w http.ResponseWriter, _ *http.Request) { reply(w, info) })
	mux.Handle("GET "+wire.PathRelay, r)
	s := httptest.NewUnstartedServer(mux)
	url := "http://" + s.Listener.Addr().String()
	info.Relays = []wire.Relay{{Name: "home", UDP: info.STUN[0], URL: url + wire.PathRelay}}
	s.Start()
	t.Cleanup(s.Close)
	ts.Setenv("CULVERT_COORDINATOR", url)
}

func reply(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }

// hole gives a port that answers nothing.
func hole(t *testing.T, ts *testscript.TestScript) uint16 {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	ts.Check(err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}
