package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	coordinatorURL = "https://culvert.example.com"
	ownerID        = "9919"
)

var (
	gatewayAddrs = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd63:756c:7665:7274::c612:1")}
	interfaceIP  = netip.MustParseAddr("10.20.0.7")
)

// rig is a door with a data plane that only takes notes.
type rig struct {
	t       testing.TB
	issuer  *claimstest.Issuer
	door    *door
	plane   *fakePlane
	log     *bytes.Buffer
	mu      sync.Mutex
	ended   map[string]string // session → reason
	renewed []wire.Renewed
	next    uint16
}

// sharedIssuer signs for all tests of the package: RSA keys are slow to make.
var sharedIssuer = sync.OnceValue(func() *claimstest.Issuer {
	i, err := claimstest.New("https://issuer.example.com")
	if err != nil {
		panic(err)
	}
	return i
})

// newRig makes a door that pins ownerID and, where rules are given, has a policy of its own.
func newRig(t testing.TB, rules string, owners ...string) *rig {
	t.Helper()
	issuer := sharedIssuer()
	issuer.SetNow(time.Now)
	keys, err := json.Marshal(issuer.KeySet())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		t.Fatal(err)
	}
	opts := Options{
		Coordinator: coordinatorURL, Network: "corp", Owners: owners, EnrolTokenFile: file,
		Issuers: []claims.Issuer{{URL: issuer.URL(), JWKSFile: file}}, Name: "gw",
	}
	opts.Limits.fill()
	if rules != "" {
		opts.PolicyFile = filepath.Join(t.TempDir(), "policy.yaml")
		if err := os.WriteFile(opts.PolicyFile, []byte(rules), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	verifier, err := claims.New(claims.Options{Issuers: opts.Issuers})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = verifier.Close() })
	j, err := newJudge(&opts, verifier)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, issuer: issuer, plane: &fakePlane{carriers: map[string]*fakeCarrier{}}, log: &bytes.Buffer{}, ended: map[string]string{}}
	own := &ownAddrs{list: func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: interfaceIP.AsSlice(), Mask: net.CIDRMask(24, 32)}}, nil
	}}
	if err := own.refresh(); err != nil {
		t.Fatal(err)
	}
	m := newMetrics()
	r.door = &door{
		name: "gw", key: newKey(t), judge: j, plane: r.plane, own: own, metrics: m,
		log:    slog.New(slog.NewJSONHandler(&lockedWriter{w: r.log}, nil)),
		places: make(chan struct{}, opts.Limits.Offers), rate: rate.NewLimiter(rate.Inf, 1),
		candidates: func() ([]wire.Candidate, wire.Mapping) { return nil, wire.MappingHard },
		grants:     func(context.Context, []wire.RelayGrant, time.Time) []tunnel.Grant { return nil },
		renewed:    func(w wire.Renewed) { r.renewed = append(r.renewed, w) },
	}
	r.door.table = newTable(opts.Limits.Sessions, m.count, func(s *session, reason string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.ended[s.id] = reason
	})
	return r
}

func (r *rig) reasonOf(id string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ended[id]
}

type lockedWriter struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func newKey(t testing.TB) wire.Key {
	t.Helper()
	k, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k.Public()
}

// token is what the issuer gives to a job of the pinned owner for this key.
func (r *rig) token(key wire.Key, over map[string]any) wire.Secret {
	all := map[string]any{"repository_owner_id": ownerID, "repository_id": "74", "repository": "acme/shop", "run_id": "1001", "ref": "refs/heads/main"}
	for k, v := range over {
		all[k] = v
	}
	return wire.Secret(r.issuer.Sign(wire.Audience(coordinatorURL, key), all))
}

// fresh is an honest coordinator's offer of a fresh session.
func (r *rig) fresh() wire.Offer {
	key := newKey(r.t)
	r.next++
	four := [4]byte{198, 18, byte(r.next>>8) + 1, byte(r.next)}
	six := gatewayAddrs[1].As16()
	copy(six[12:], four[:])
	return wire.Offer{
		Session: key.SessionID(), Key: key, Token: r.token(key, nil),
		Addresses:  []netip.Addr{netip.AddrFrom4(four), netip.AddrFrom16(six)},
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.9:4000")}},
		Grants:     []wire.Grant{{Rule: "deploy", Allow: "tcp 10.20.0.5:5432"}},
		Lease:      wire.Duration(10 * time.Minute), MaxSession: wire.Duration(2 * time.Hour),
	}
}

func (r *rig) admit(o wire.Offer) (wire.Answer, error) {
	r.t.Helper()
	return r.door.admit(context.Background(), o)
}

func (r *rig) mustAdmit(o wire.Offer) *session {
	r.t.Helper()
	if _, err := r.admit(o); err != nil {
		r.t.Fatalf("admit: %v", err)
	}
	s, live := r.door.table.get(o.Session)
	if !live {
		r.t.Fatal("admitted, but not live")
	}
	return s
}

// fakePlane notes what is opened.
type fakePlane struct {
	mu       sync.Mutex
	carriers map[string]*fakeCarrier
	before   func(id string) // called inside open
	err      error
}

func (p *fakePlane) addresses() []netip.Addr { return gatewayAddrs }

func (p *fakePlane) services() names.Ranges {
	r, err := serviceRanges(gatewayAddrs, netip.Prefix{})
	if err != nil {
		panic(err)
	}
	return r
}

func (p *fakePlane) open(id string, key wire.Key, addrs []netip.Addr, r reach, scope *policy.Scope) (carrier, error) {
	if p.before != nil {
		p.before(id)
	}
	if p.err != nil {
		return nil, p.err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	f := &fakeCarrier{key: key, way: r.way, addrs: addrs, candidates: slices.Clone(r.candidates), scope: scope}
	p.carriers[id] = f
	return f, nil
}

func (p *fakePlane) get(id string) *fakeCarrier {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.carriers[id]
}

type fakeCarrier struct {
	mu         sync.Mutex
	key        wire.Key
	way        string
	addrs      []netip.Addr
	candidates []wire.Candidate
	scope      *policy.Scope
	counts     wire.FlowCounts
	closed     int
}

func (*fakeCarrier) AwaitNames() {}

func (*fakeCarrier) Restore([]wire.NamedAddr) {}

func (c *fakeCarrier) AddCandidates(more []wire.Candidate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.candidates = append(c.candidates, more...)
}

func (c *fakeCarrier) SetScope(s *policy.Scope) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.scope = s
}

func (c *fakeCarrier) Reached() ([]wire.Reached, uint64) { return nil, 0 }

func (c *fakeCarrier) Counts() wire.FlowCounts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts
}

func (c *fakeCarrier) Reach(target forward.Target) wire.ReachResult {
	v := c.current().OffersName(target.Name, policy.TCP, target.Port)
	if target.Name == "" {
		v = c.current().Decide(policy.Flow{Proto: policy.TCP, Dst: netip.AddrPortFrom(target.Addr, target.Port)})
	}
	if !v.Allowed {
		return wire.ReachResult{Verdict: wire.FlowDenied, Reason: v.Reason}
	}
	return wire.ReachResult{Verdict: wire.Reachable, Rule: v.Rule}
}

func (c *fakeCarrier) Connections() int { return 0 }

func (c *fakeCarrier) HoldIfQuiet(time.Duration) int { return 0 }

func (c *fakeCarrier) Leave() {}

func (c *fakeCarrier) Vitals() (time.Time, string) { return time.Time{}, "none" }

func (c *fakeCarrier) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed++
}

func (c *fakeCarrier) current() *policy.Scope {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.scope
}

func (c *fakeCarrier) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed > 0
}

func (c *fakeCarrier) allows(dst string) bool {
	return c.current().Decide(policy.Flow{Proto: policy.TCP, Dst: netip.MustParseAddrPort(dst)}).Allowed
}

func TestAdmitsAnHonestOffer(t *testing.T) {
	r := newRig(t, "", ownerID)
	o := r.fresh()
	a, err := r.admit(o)
	if err != nil {
		t.Fatal(err)
	}
	if a.Gateway == nil || a.Gateway.Key != r.door.key || !slices.Equal(a.Gateway.Addresses, gatewayAddrs) {
		t.Errorf("answer %+v does not introduce the gateway", a.Gateway)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("10.20.0.5/32")}; !slices.Equal(a.Gateway.Routes, want) {
		t.Errorf("routes %v, want %v", a.Gateway.Routes, want)
	}
	if left := time.Until(a.Lease.Expires); left > 10*time.Minute || left < 9*time.Minute {
		t.Errorf("lease of %v, want 10 m", left)
	}
	c := r.plane.get(o.Session)
	if !c.allows("10.20.0.5:5432") || c.allows("10.20.0.6:5432") || c.allows("10.20.0.5:22") {
		t.Error("the scope is not what was granted")
	}
	if len(c.candidates) != 1 {
		t.Errorf("candidates %v, want the one offered", c.candidates)
	}
	if bytes.Contains(r.log.Bytes(), []byte(o.Token.Reveal()[:40])) {
		t.Error("the token is in the log")
	}
}

// A network with ranges of its own keeps its sessions apart there, too.
func TestNetworksOwnRangesAreNeverReachable(t *testing.T) {
	r := newRig(t, "", ownerID)
	r.door.told.Store(&[]netip.Prefix{netip.MustParsePrefix("10.250.0.0/16")})
	o := r.fresh()
	o.Grants = []wire.Grant{{Rule: "wide", Allow: "tcp 10.0.0.0/8:*"}, {Rule: "exact", Allow: "tcp 10.250.3.4:80"}}
	r.mustAdmit(o)
	c := r.plane.get(o.Session)
	if !c.allows("10.20.0.5:5432") {
		t.Error("what is granted is out of reach")
	}
	for _, dst := range []string{"10.250.3.4:80", "10.250.255.1:443", "198.18.7.7:80", "198.19.7.7:80"} {
		if c.allows(dst) {
			t.Errorf("%s, an address of the overlay, is reachable", dst)
		}
	}
}

// TestRefusesLies plays a hostile coordinator. Whatever it says, the gateway opens nothing.
func TestRefusesLies(t *testing.T) {
	for name, lie := range lies() {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, "", ownerID)
			o := r.fresh()
			lie.tell(r, &o)
			a, err := r.admit(o)
			if err == nil {
				t.Fatalf("admitted: %+v", a)
			}
			if got := problem.CodeOf(err); got != lie.code {
				t.Errorf("code %s (%v), want %s", got, err, lie.code)
			}
			if c := r.plane.get(o.Session); c != nil {
				t.Error("the data plane was opened")
			}
			if doc := refusal(err); len(doc.Problem) == 0 || (o.Token != "" && bytes.Contains(doc.Problem, []byte(o.Token.Reveal()))) {
				t.Errorf("the refusal is %s", doc.Problem)
			}
			if r.door.table.size() != 0 {
				t.Error("a refused offer keeps a place")
			}
		})
	}
}

type lie struct {
	tell func(r *rig, o *wire.Offer)
	code problem.Code
}

func lies() map[string]lie {
	with := func(over map[string]any) func(*rig, *wire.Offer) {
		return func(r *rig, o *wire.Offer) { o.Token = r.token(o.Key, over) }
	}
	addrs := func(text ...string) func(*rig, *wire.Offer) {
		return func(_ *rig, o *wire.Offer) {
			o.Addresses = nil
			for _, a := range text {
				o.Addresses = append(o.Addresses, netip.MustParseAddr(a))
			}
		}
	}
	const six = "fd63:756c:7665:7274::c612:109"
	return map[string]lie{
		"forged token": {func(r *rig, o *wire.Offer) {
			forger, err := claimstest.New(r.issuer.URL())
			if err != nil {
				r.t.Fatal(err)
			}
			o.Token = wire.Secret(forger.Sign(wire.Audience(coordinatorURL, o.Key), map[string]any{"repository_owner_id": ownerID}))
		}, problem.TokenUnknownKey},
		"right token, another key": {func(r *rig, o *wire.Offer) {
			o.Key = newKey(r.t)
			o.Session = o.Key.SessionID()
		}, problem.TokenAudience},
		"right token for another coordinator": {func(r *rig, o *wire.Offer) {
			o.Token = wire.Secret(r.issuer.Sign(wire.Audience("https://evil.example.com", o.Key), map[string]any{"repository_owner_id": ownerID}))
		}, problem.TokenAudience},
		"session id of another key":       {func(r *rig, o *wire.Offer) { o.Session = newKey(r.t).SessionID() }, problem.BadRequest},
		"the gateway's own key":           {func(r *rig, o *wire.Offer) { o.Key = r.door.key; o.Session = o.Key.SessionID() }, problem.BadRequest},
		"no key":                          {func(_ *rig, o *wire.Offer) { o.Key = wire.Key{}; o.Session = o.Key.SessionID() }, problem.BadRequest},
		"another owner's repository":      {with(map[string]any{"repository_owner_id": "666"}), problem.GatewayRefused},
		"owner id of a prefix":            {with(map[string]any{"repository_owner_id": ownerID + "1"}), problem.GatewayRefused},
		"token without an owner":          {with(map[string]any{"repository_owner_id": nil}), problem.GatewayRefused},
		"token without a run":             {with(map[string]any{"run_id": nil}), problem.GatewayRefused},
		"expired token":                   {func(r *rig, o *wire.Offer) { r.at(-time.Hour); o.Token = r.token(o.Key, nil) }, problem.TokenExpired},
		"token of the future":             {func(r *rig, o *wire.Offer) { r.at(time.Hour); o.Token = r.token(o.Key, nil) }, problem.TokenEarly},
		"no token":                        {func(_ *rig, o *wire.Offer) { o.Token = "" }, problem.TokenInvalid},
		"oversized token":                 {func(_ *rig, o *wire.Offer) { o.Token = wire.Secret(make([]byte, wire.MaxToken+1)) }, problem.TooLarge},
		"the gateway's overlay address":   {addrs("198.18.0.1", six), problem.BadRequest},
		"the gateway's overlay address 6": {addrs("198.18.1.9", "fd63:756c:7665:7274::c612:1"), problem.BadRequest},
		"an interface's address":          {addrs(interfaceIP.String(), six), problem.BadRequest},
		"one address":                     {addrs("198.18.1.9"), problem.BadRequest},
		"three addresses":                 {addrs("198.18.1.9", six, "198.18.1.10"), problem.BadRequest},
		"two of one family":               {addrs("198.18.1.9", "198.18.1.10"), problem.BadRequest},
		"loopback address":                {addrs("127.0.0.1", six), problem.BadRequest},
		"multicast address":               {addrs("224.0.0.1", six), problem.BadRequest},
		"metadata address":                {addrs("169.254.169.254", six), problem.BadRequest},
		"unspecified address":             {addrs("0.0.0.0", six), problem.BadRequest},
		"broadcast address":               {addrs("255.255.255.255", six), problem.BadRequest},
		"address in disguise":             {addrs("198.18.1.9", "::ffff:198.18.1.9"), problem.BadRequest},
		"address with a zone":             {addrs("198.18.1.9", "fd00::1%eth0"), problem.BadRequest},
		"too many candidates":             {func(_ *rig, o *wire.Offer) { o.Candidates = make([]wire.Candidate, wire.MaxCandidates+1) }, problem.BadRequest},
		"no grants":                       {func(_ *rig, o *wire.Offer) { o.Grants = nil }, problem.BadRequest},
		"too many grants":                 {func(_ *rig, o *wire.Offer) { o.Grants = make([]wire.Grant, maxGrants+1) }, problem.BadRequest},
		"a huge grant":                    {func(_ *rig, o *wire.Offer) { o.Grants[0].Allow = string(make([]byte, maxText+1)) }, problem.BadRequest},
		"a grant that does not parse":     {func(_ *rig, o *wire.Offer) { o.Grants[0].Allow = "everything" }, problem.BadRequest},
		"negative lease":                  {func(_ *rig, o *wire.Offer) { o.Lease = -1 }, problem.BadRequest},
		"negative longest session":        {func(_ *rig, o *wire.Offer) { o.MaxSession = -1 }, problem.BadRequest},
	}
}

// at moves the issuer's clock.
func (r *rig) at(d time.Duration) {
	r.issuer.SetNow(func() time.Time { return time.Now().Add(d) })
}

func TestRefusesWhatAnotherSessionHolds(t *testing.T) {
	r := newRig(t, "", ownerID)
	first := r.fresh()
	r.mustAdmit(first)
	for name, c := range map[string]struct {
		tell func(*wire.Offer)
		code problem.Code
	}{
		"IPv4 address": {func(o *wire.Offer) { o.Addresses[0] = first.Addresses[0] }, problem.GatewayRefused},
		"IPv6 address": {func(o *wire.Offer) { o.Addresses[1] = first.Addresses[1] }, problem.GatewayRefused},
		"key":          {func(o *wire.Offer) { o.Key, o.Session, o.Token = first.Key, first.Session, first.Token }, problem.KeyInUse},
	} {
		t.Run(name, func(t *testing.T) {
			o := r.fresh()
			c.tell(&o)
			if _, err := r.admit(o); problem.CodeOf(err) != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			if s, live := r.door.table.get(first.Session); !live || s.addrs[0] != first.Addresses[0] {
				t.Error("the first session suffered")
			}
			if r.plane.get(first.Session).isClosed() {
				t.Error("the first session was closed")
			}
			if got, ok := r.door.table.from(first.Addresses[0]); !ok || got.id != first.Session {
				t.Error("the first session lost its address")
			}
		})
	}
	if r.door.table.size() != 1 {
		t.Errorf("%d sessions, want the first alone", r.door.table.size())
	}
}

const ownRules = `
rules:
  - name: own
    match: {repository_owner_id: 9919, repository: acme/shop}
    allow: ["tcp 10.20.0.0/24:5432"]
    max_session: 30m
`

func TestOwnPolicyNarrowsWhatIsOffered(t *testing.T) {
	r := newRig(t, ownRules)
	o := r.fresh()
	o.Grants = []wire.Grant{{Rule: "wide", Allow: "tcp,udp 0.0.0.0/0:1-65535"}}
	a, err := r.admit(o)
	if err != nil {
		t.Fatal(err)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}; !slices.Equal(a.Gateway.Routes, want) {
		t.Errorf("routes %v, want %v", a.Gateway.Routes, want)
	}
	c := r.plane.get(o.Session)
	for dst, want := range map[string]bool{
		"10.20.0.5:5432": true, "10.20.0.5:22": false, "10.30.0.5:5432": false, "169.254.169.254:80": false,
		interfaceIP.String() + ":5432": false, "198.18.1.77:5432": false, "127.0.0.1:5432": false,
		"10.20.0.255:5432": false, "10.20.0.0:5432": false, // broadcasts of the interface's network
	} {
		if got := c.allows(dst); got != want {
			t.Errorf("%s allowed: %t, want %t", dst, got, want)
		}
	}
	if left := time.Until(a.Lease.Ends); left > 30*time.Minute {
		t.Errorf("the session may last %v, the gateway's own policy says 30m", left)
	}
}

// TestLongestSessionBoundsTheOwnPolicy: a rule of the gateway's own file may shorten what its operator set, and not lengthen it.
func TestLongestSessionBoundsTheOwnPolicy(t *testing.T) {
	r := newRig(t, ownRules)
	r.door.judge.maxSession = 10 * time.Minute
	a, err := r.admit(r.fresh())
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(a.Lease.Ends); left > 10*time.Minute {
		t.Errorf("the session may last %v", left)
	}
}

// TestOwnPolicyChangesDuringAdmission: a file that is taken up while a session is being opened holds for it as well.
func TestOwnPolicyChangesDuringAdmission(t *testing.T) {
	r := newRig(t, ownRules)
	changed, err := policy.ParseFile("policy.yaml", []byte(strings.Replace(ownRules, "acme/shop", "acme/other", 1)), policy.Options{Issuers: r.door.judge.issuers})
	if err != nil {
		t.Fatal(err)
	}
	r.plane.before = func(string) { r.door.judge.policy.Store(changed) }
	if _, err := r.admit(r.fresh()); problem.CodeOf(err) != problem.Denied {
		t.Errorf("admitted by a policy that holds no more: %v", err)
	}
	if r.door.table.size() != 0 {
		t.Error("it keeps a place")
	}
}

// TestOwnersAreOfOneIssuer: an owner's id is a number of the issuer that gave it. Another one's owner may have the same.
func TestOwnersAreOfOneIssuer(t *testing.T) {
	o := Options{Owners: []string{ownerID}, Issuers: []claims.Issuer{{URL: "https://ghes.example.com/_services/token"}, {URL: claims.GitHub}}}
	j, err := newJudge(&o, nil)
	if err != nil {
		t.Fatal(err)
	}
	for issuer, want := range map[string]problem.Code{claims.GitHub: "", o.Issuers[0].URL: problem.GatewayRefused} {
		_, err := j.rule(&claims.Claims{Issuer: issuer, RepositoryOwnerID: ownerID})
		if err != nil != (want != "") || err != nil && problem.CodeOf(err) != want {
			t.Errorf("%s: %v, want %q", issuer, err, want)
		}
	}
}

func TestOwnPolicyRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		claims map[string]any
		grant  string
		owners []string
		code   problem.Code
	}{
		"another repository of the owner": {claims: map[string]any{"repository": "acme/other"}, grant: "tcp 10.20.0.5:5432", code: problem.Denied},
		"a stranger":                      {claims: map[string]any{"repository_owner_id": "1", "repository": "evil/x"}, grant: "tcp 10.20.0.5:5432", code: problem.GatewayRefused},
		"nothing in common":               {grant: "tcp 10.99.0.5:5432", code: problem.GatewayRefused},
		"owner pin beside the policy":     {grant: "tcp 10.20.0.5:5432", owners: []string{"1"}, code: problem.GatewayRefused},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, ownRules, c.owners...)
			o := r.fresh()
			o.Token = r.token(o.Key, c.claims)
			o.Grants[0].Allow = c.grant
			if _, err := r.admit(o); problem.CodeOf(err) != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			if r.plane.get(o.Session) != nil {
				t.Error("the data plane was opened")
			}
		})
	}
}

func TestFailingPlaneLeavesNothing(t *testing.T) {
	r := newRig(t, "", ownerID)
	r.plane.err = errors.New("out of peers")
	o := r.fresh()
	if _, err := r.admit(o); problem.CodeOf(err) != problem.GatewayRefused {
		t.Fatalf("got %v", err)
	}
	r.plane.err = nil
	r.mustAdmit(o)
}

func TestCapOnSessions(t *testing.T) {
	r := newRig(t, "", ownerID)
	r.door.table.max = 2
	r.mustAdmit(r.fresh())
	o := r.fresh()
	r.mustAdmit(o)
	if _, err := r.admit(r.fresh()); problem.CodeOf(err) != problem.NoGateway {
		t.Fatalf("got %v, want no-gateway", err)
	}
	r.door.table.cancel(o.Session, "done")
	r.mustAdmit(r.fresh())
}

// TestConcurrentOffers races offers for the same key, the same address and different ones.
func TestConcurrentOffers(t *testing.T) {
	r := newRig(t, "", ownerID)
	same := r.fresh()
	var offers []wire.Offer
	for range 8 {
		other := r.fresh()
		clash := r.fresh()
		clash.Addresses = same.Addresses
		offers = append(offers, same, other, clash)
	}
	var wg sync.WaitGroup
	for _, o := range offers {
		wg.Go(func() { _, _ = r.door.admit(context.Background(), o) })
	}
	wg.Wait()
	if got := r.door.table.size(); got != 9 { // the eight others, and one holder of the contested address
		t.Errorf("%d sessions, want 9", got)
	}
	for _, s := range r.door.table.all() {
		if r.plane.get(s.id).isClosed() {
			t.Error("a live session is closed")
		}
	}
	r.door.table.close("test")
	for id, c := range r.plane.carriers {
		if c.closed != 1 {
			t.Errorf("session %s closed %d times", id, c.closed)
		}
	}
}

func TestTrickleAndEndDuringAdmission(t *testing.T) {
	late := wire.Candidate{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("203.0.113.5:5000")}
	t.Run("candidates are kept", func(t *testing.T) {
		r := newRig(t, "", ownerID)
		r.plane.before = func(id string) { r.door.table.trickle(id, []wire.Candidate{late}) }
		o := r.fresh()
		r.mustAdmit(o)
		if c := r.plane.get(o.Session); !slices.Contains(c.candidates, late) {
			t.Errorf("candidates %v lack the late one", c.candidates)
		}
	})
	t.Run("an end is heeded", func(t *testing.T) {
		r := newRig(t, "", ownerID)
		o := r.fresh()
		done := make(chan struct{})
		r.plane.before = func(id string) {
			go func() {
				defer close(done)
				r.door.table.cancel(id, "client went away")
			}()
			for s, _ := r.door.table.get(id); !r.door.table.isGone(s); {
				time.Sleep(time.Microsecond)
			}
		}
		if _, err := r.admit(o); problem.CodeOf(err) != problem.SessionOver {
			t.Fatalf("got %v, want session-over", err)
		}
		<-done
		if !r.plane.get(o.Session).isClosed() || r.door.table.size() != 0 {
			t.Error("the session lingers")
		}
	})
}

func TestBusyGatewayRefusesUnverified(t *testing.T) {
	r := newRig(t, "", ownerID)
	r.door.rate = rate.NewLimiter(0, 0)
	if _, err := r.admit(r.fresh()); problem.CodeOf(err) != problem.RateLimited {
		t.Errorf("got %v, want rate-limited", err)
	}
	r.door.rate = rate.NewLimiter(rate.Inf, 1)
	r.door.places = make(chan struct{})
	if _, err := r.admit(r.fresh()); problem.CodeOf(err) != problem.RateLimited {
		t.Errorf("got %v, want rate-limited", err)
	}
}

func BenchmarkAdmit(b *testing.B) {
	r := newRig(b, ownRules)
	for b.Loop() {
		o := r.fresh()
		if _, err := r.door.admit(context.Background(), o); err != nil {
			b.Fatal(err)
		}
		r.door.table.cancel(o.Session, "done")
	}
}
