package server

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/internal/wire"
)

// projected is a service account's token, as a kubelet projects it, that expires at a time.
func (r *rig) projected(subject string, exp time.Time) string {
	return "Bearer " + r.kube.SignExactly(map[string]any{
		"iss": r.kube.URL(), "sub": subject, "aud": []string{publicURL}, "iat": time.Now().Add(-time.Minute).Unix(),
		"nbf": time.Now().Add(-time.Minute).Unix(), "exp": exp.Unix(), "jti": "8a7c1f2e-0d4b-4c5a-9e61-3f1f6a2b7c90",
		"kubernetes.io": map[string]any{
			"namespace": "culvert", "node": map[string]any{"name": "worker-1", "uid": "5b1d"}, "pod": map[string]any{"name": "gateway-0", "uid": "0c2e"},
			"serviceaccount": map[string]any{"name": "gateway", "uid": "77aa"}, "warnafter": exp.Unix(),
		},
	})
}

const serviceAccount = "system:serviceaccount:culvert:gateway"

// A gateway's stream lasts as long as its identity token, unless it brings a fresh one.
func TestStreamLastsAsLongAsItsToken(t *testing.T) {
	var ahead atomic.Int64 // of the coordinator's clock
	clock := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	r := newRig(t, Options{API: api.Options{Now: clock, PresenceEvery: 20 * time.Millisecond, PresenceTTL: time.Minute}})
	exp := time.Now().Add(time.Hour)
	as := func(name, credential string) *apitest.Gateway {
		return r.gateway(func(o *apitest.Options) { o.Hello, o.Credential = hello(name), credential })
	}
	stays := map[string]*apitest.Gateway{
		"one with a fresh token": as("fresh", r.projected(serviceAccount, exp)),
		"one with a secret":      as("plain", "Enrol "+enrolSecret),
	}
	ends := map[string]*apitest.Gateway{
		"one with another's token": as("wrong", r.projected(serviceAccount, exp)),
		"one with a stale token":   as("stale", r.projected(serviceAccount, exp)),
	}
	send := func(g *apitest.Gateway, credential string) {
		t.Helper()
		if err := g.Send(t.Context(), wire.FrameCredential, 0, wire.Credential{Authorization: wire.Secret(credential)}); err != nil {
			t.Fatal(err)
		}
	}
	send(stays["one with a fresh token"], r.projected(serviceAccount, exp.Add(time.Hour)))
	send(ends["one with another's token"], r.projected("system:serviceaccount:default:default", exp.Add(time.Hour)))
	for _, said := range []string{"gateway has proven again who it is", "gateway's message refused"} {
		r.eventually("the log says: "+said, func() bool { return strings.Contains(r.log.String(), said) })
	}
	ahead.Store(int64(time.Hour + 2*time.Minute))
	for name, g := range ends {
		select {
		case <-g.Done():
		case <-time.After(30 * time.Second):
			t.Fatalf("%s outlives its own; log:\n%s", name, r.log)
		}
		if code := websocket.CloseStatus(g.Err()); code != websocket.StatusServiceRestart {
			t.Errorf("%s ended with %v", name, g.Err())
		}
	}
	for name, g := range stays {
		select {
		case <-g.Done():
			t.Errorf("%s ended with %v", name, g.Err())
		default:
		}
	}
	if strings.Contains(r.log.String(), "eyJ") {
		t.Errorf("the log shows a token:\n%s", r.log)
	}
}

// A gateway that comes back with another WireGuard key is taken, and that is said.
func TestChangedGatewayKeyIsNoticed(t *testing.T) {
	r := newRig(t, Options{})
	const notice = "the gateway's key has changed"
	connect := func(instance string, key wire.Key) {
		t.Helper()
		g, err := r.dial(func(o *apitest.Options) {
			o.Hello = hello("east")
			o.Hello.Instance = strings.Repeat(instance, 20)
			if !key.IsZero() {
				o.Hello.Key = key
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		g.Close()
	}
	connect("a", wire.Key{})
	connect("b", wire.Key{})
	if strings.Contains(r.log.String(), notice) {
		t.Errorf("a key that stays is told of:\n%s", r.log)
	}
	connect("c", wire.Key{9})
	r.eventually("the changed key is told of", func() bool { return strings.Contains(r.log.String(), notice) })
	was, key := hello("east").Key, wire.Key{9}
	if log := r.log.String(); !strings.Contains(log, "was="+was.String()) || !strings.Contains(log, "key="+key.String()) {
		t.Errorf("the log does not name both keys:\n%s", log)
	}
}
