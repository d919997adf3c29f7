package doctor

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/egress/egresstest"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/requirements"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds one test of something that answers at once on a machine that is not very busy.
const patience = 30 * time.Second

// cloud is a coordinator with a relay, an issuer and a NATS server's port, all on loopback.
type cloud struct {
	*httptest.Server
	relay  *relay.Server
	issuer string
	nats   string
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{}
	c.relay, err = relay.New(t.Context(), relay.Options{UDP: "127.0.0.1:0", Probe: "127.0.0.1:0", Keys: []ed25519.PublicKey{public}, Sockets: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.relay.Close() })
	mux := http.NewServeMux()
	c.Server = httptest.NewUnstartedServer(mux)
	info := wire.Info{
		Version: wire.Version, STUN: []string{fmt.Sprintf(":%d", c.relay.Addr().Port()), fmt.Sprintf(":%d", c.relay.ProbeAddr().Port())},
		// Under another name than the coordinator's, so that it counts as one elsewhere.
		Relays: []wire.Relay{{Name: "far", UDP: fmt.Sprintf("localhost:%d", c.relay.Addr().Port()), URL: "http://localhost:" + portOf(c.Listener) + wire.PathRelay}},
	}
	mux.HandleFunc("GET "+wire.PathInfo, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(info) })
	mux.Handle("GET "+wire.PathRelay, c.relay)
	mux.HandleFunc("GET /issuer/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") })
	c.Start()
	t.Cleanup(c.Close)
	c.issuer = c.URL + "/issuer"
	c.nats = "nats://" + c.Listener.Addr().String()
	return c
}

func portOf(l net.Listener) string { return fmt.Sprint(l.Addr().(*net.TCPAddr).Port) }

func parse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// statuses maps rows to their status.
func statuses(r *Report) map[string]Status {
	out := map[string]Status{}
	for _, row := range r.Rows {
		out[row.ID] = row.Status
	}
	return out
}

func TestEverythingWorks(t *testing.T) {
	c := newCloud(t)
	for _, tc := range []struct {
		party    requirements.Party
		facts    requirements.Facts
		untested []string
	}{
		{requirements.Runner, requirements.Facts{TokenURL: parse(t, c.URL+"/token?secret=1")}, []string{"runner/release", "runner/direct"}},
		{requirements.Gateway, requirements.Facts{Issuers: []string{c.issuer}}, []string{"gateway/targets", "gateway/direct", "gateway/listen", "gateway/router", "gateway/metrics"}},
		{requirements.Coordinator, requirements.Facts{Issuers: []string{c.issuer}, NATS: []string{c.nats}, ACME: c.URL + "/token"}, []string{"coordinator/filter", "coordinator/private", "coordinator/challenge"}},
	} {
		t.Run(string(tc.party), func(t *testing.T) {
			tc.facts.Coordinator = parse(t, c.URL)
			r := Run(t.Context(), Options{Party: tc.party, Facts: tc.facts, Timeout: patience})
			got := statuses(r)
			for _, id := range tc.untested {
				if got[id] != Untested {
					t.Errorf("%s is %s, though it cannot be tested", id, got[id])
				}
				delete(got, id)
			}
			for id, status := range got {
				if status != OK {
					t.Errorf("%s: %s", id, status)
				}
			}
			if !r.OK || r.Proxy != "" {
				t.Errorf("ok %v, proxy %q", r.OK, r.Proxy)
			}
			var text bytes.Buffer
			if err := r.WriteText(&text); err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"HTTPS goes straight", "STATUS", "a coordinator answers, plain HTTP", "Everything that could be tested works."} {
				if !strings.Contains(text.String(), want) {
					t.Errorf("no %q in\n%s", want, text.String())
				}
			}
			if strings.ContainsAny(text.String(), "`") || strings.Contains(text.String(), "secret") {
				t.Errorf("marks or secrets in\n%s", text.String())
			}
		})
	}
}

func TestFailuresAreTold(t *testing.T) {
	hole, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	c := newCloud(t)
	facts := requirements.Facts{
		Coordinator: parse(t, c.URL), STUN: []string{hole.LocalAddr().String(), fmt.Sprintf(":%d", c.relay.ProbeAddr().Port())},
		Relays:  []wire.Relay{{Name: "stun", UDP: fmt.Sprintf("localhost:%d", c.relay.ProbeAddr().Port()), URL: "http://localhost:" + portOf(c.Listener) + "/"}},
		Issuers: []string{c.URL + "/nobody", "https://nowhere..invalid"},
	}
	r := Run(t.Context(), Options{Party: requirements.Gateway, Facts: facts, Timeout: 5 * time.Second})
	want := map[string]Status{
		"gateway/coordinator": OK, "gateway/issuer": Failed, "gateway/dns": Failed, "gateway/stun": Failed, "gateway/probe": OK,
		"gateway/relay-udp": Failed, "gateway/relay-https": Failed,
	}
	got := statuses(r)
	for id, status := range want {
		if got[id] != status {
			t.Errorf("%s: %s, want %s", id, got[id], status)
		}
	}
	if r.OK {
		t.Error("all is well, though an issuer cannot be reached")
	}
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"what answers is no issuer: 404", "the name does not resolve", "no answer: UDP to this port", "what answers is no relay",
		"\nWithout this nothing works: gateway/issuer.\n", "\nThis does not work either, and is worth having: gateway/dns, gateway/stun, gateway/relay-https, gateway/relay-udp.\n"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
}

func TestNoCoordinator(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	r := Run(t.Context(), Options{Party: requirements.Runner, Facts: requirements.Facts{Coordinator: parse(t, "http://"+l.Addr().String())}, Timeout: time.Second})
	got := statuses(r)
	// The usual ports are tested where the coordinator cannot be asked. What listens on this machine's is its own business.
	if r.OK || got["runner/coordinator"] != Failed || got["runner/stun"] == Untested || got["runner/probe"] == Untested || got["runner/relay-udp"] != Untested {
		t.Errorf("%v, %v", r.OK, got)
	}
	empty := Run(t.Context(), Options{Party: requirements.Runner})
	for id, status := range statuses(empty) {
		if status != Untested {
			t.Errorf("%s: %s, though nothing is known", id, status)
		}
	}
	var text bytes.Buffer
	if err := empty.WriteText(&text); err != nil || !strings.HasSuffix(text.String(), "\nThis is required, and could not be tested from here: runner/coordinator, runner/token.\n") {
		t.Errorf("%v\n%s", err, text.String())
	}
	if !empty.OK {
		t.Error("what was not tested has failed")
	}
}

// Behind a proxy names are not looked up here, and no password is shown.
func TestThroughAProxy(t *testing.T) {
	c := newCloud(t)
	at := c.Listener.Addr().String()
	proxy := egresstest.Start(t, &egresstest.Proxy{User: "gw", Password: "opensesame", Hosts: map[string]string{"culvert..invalid": at, "issuer..invalid": at}})
	for _, name := range []string{"https_proxy", "http_proxy", "HTTP_PROXY", "HTTPS_PROXY"} {
		t.Setenv(name, proxy.URL())
	}
	t.Setenv("NO_PROXY", "")
	t.Setenv("no_proxy", "")
	r := Run(t.Context(), Options{Party: requirements.Gateway, InsecureHTTP: true, Timeout: patience, Facts: requirements.Facts{
		Coordinator: parse(t, "http://culvert..invalid"), STUN: []string{fmt.Sprintf("127.0.0.1:%d", c.relay.Addr().Port())}, Issuers: []string{"http://issuer..invalid/issuer"},
	}})
	got := statuses(r)
	if !r.OK || got["gateway/coordinator"] != OK || got["gateway/issuer"] != OK || got["gateway/dns"] != Failed {
		t.Errorf("%v, %v", r.OK, got)
	}
	if addrs := r.Rows[0].Checks[0].Addresses; len(addrs) != 0 {
		t.Errorf("the name was looked up: %v", addrs)
	}
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	_ = json.NewEncoder(&text).Encode(r)
	if strings.Contains(text.String(), "opensesame") || !strings.Contains(text.String(), "HTTPS goes through the proxy http://127.0.0.1:") {
		t.Errorf("%s", text.String())
	}
}

// fields lists the JSON paths of a type, as the documentation writes them.
func fields(typ reflect.Type, prefix string) (out []string) {
	switch {
	case typ.Kind() == reflect.Slice:
		return fields(typ.Elem(), prefix+"[]")
	case typ.Kind() == reflect.Struct && typ != reflect.TypeFor[netip.Addr]():
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			out = append(out, fields(typ.Field(i).Type, strings.TrimPrefix(prefix+"."+name, "."))...)
		}
		return out
	}
	return []string{prefix}
}

// Every field of the JSON is in the documentation.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/network-requirements.md")
	if err != nil {
		t.Fatal(err)
	}
	want := fields(reflect.TypeFor[Report](), "")
	for _, f := range want {
		if !strings.Contains(string(text), "\n| `"+f+"` |") {
			t.Errorf("docs/network-requirements.md does not describe `%s`", f)
		}
	}
	if n := strings.Count(string(text), "\n| `"); n != len(want) {
		t.Errorf("docs/network-requirements.md describes %d fields, and there are %d", n, len(want))
	}
}
