package config

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// document is culvert.yaml as it is written. The comments on its keys are what editors show: see schema.go.
type document struct {
	// URL at which clients and gateways reach the coordinator; part of every token's audience.
	URL string `yaml:"url" jsonschema:"required"`
	// Listen is the TCP address for HTTP, such as ":443".
	Listen string `yaml:"listen"`
	// TLS names the certificate; without it only loopback and trusted proxies are served.
	TLS *TLS `yaml:"tls"`
	// ACME asks a CA for the certificate, instead.
	ACME *ACME `yaml:"acme"`
	// TrustedProxies are addresses and ranges whose X-Forwarded-For is believed.
	TrustedProxies []string `yaml:"trusted_proxies"`
	// UDP address for STUN and the relay, such as ":3478", or off.
	UDP string `yaml:"udp"`
	// Probe is the UDP address of the second STUN port, or off.
	Probe string `yaml:"probe"`
	// Relay is this node's own, or off.
	Relay yamlfile.OrOff[Relay] `yaml:"relay"`
	// Relays that run elsewhere.
	Relays []relayDoc `yaml:"relays"`
	// State is where leases live.
	State State `yaml:"state" jsonschema:"required"`
	// Audit says how long the audit log is kept and where it goes besides.
	Audit auditDoc `yaml:"audit"`
	// Private is the listener for operators: metrics, health, profiles and the audit log.
	Private privateDoc `yaml:"private"`
	// Limits bound what is done for whoever asks, before anybody has proven anything.
	Limits Limits `yaml:"limits"`
	// Issuers whose tokens may admit jobs; default GitHub's public one.
	Issuers []issuerDoc `yaml:"issuers"`
	// Networks that jobs get into, by name.
	Networks map[string]networkDoc `yaml:"networks" jsonschema:"required"`
	// STUN servers that clients ask instead of this coordinator, as host:port.
	STUN []string `yaml:"stun"`
	// Lease is how long one lease lasts, such as 10m; renewed at half of that.
	Lease time.Duration `yaml:"lease"`
	// Downloads is a folder with releases, served below /dl/ to runners that cannot reach GitHub: v1.2.3/culvert-linux-amd64.gz and so on.
	Downloads string `yaml:"downloads"`
	// InsecureHTTP accepts plain HTTP beyond loopback.
	InsecureHTTP bool `yaml:"insecure_http"`
	// Include names files with more rules, targets and groups, or folders of such files.
	Include         policy.Values `yaml:"include"`
	policy.Document `yaml:",inline"`
}

type issuerDoc struct {
	// Name under which rules may speak of the issuer, as iss.
	Name string `yaml:"name"`
	// URL exactly as the tokens' iss has it.
	URL string `yaml:"url" jsonschema:"required"`
	// JWKSFile holds the issuer's keys, where they cannot be fetched.
	JWKSFile string `yaml:"jwks_file"`
}

type networkDoc struct {
	// Gateways that may serve the network.
	Gateways []enrolmentDoc `yaml:"gateways" jsonschema:"required"`
	// Sessions is the IPv4 range of session addresses; default 198.18.0.0/16.
	Sessions string `yaml:"sessions"`
	// Services is the IPv4 range of service addresses; default 198.19.0.0/16.
	Services string `yaml:"services"`
}

// enrolmentDoc knows a gateway by a workload identity, issuer and subject, or by enrol_sha256.
type enrolmentDoc struct {
	// Issuer of the gateway's workload identity.
	Issuer string `yaml:"issuer"`
	// Subject is the token's sub, such as system:serviceaccount:culvert:gateway.
	Subject string `yaml:"subject"`
	// JWKSFile holds the issuer's keys, where they cannot be fetched.
	JWKSFile string `yaml:"jwks_file"`
	// EnrolSHA256 is the SHA-256 of an enrolment secret, in hexadecimal.
	EnrolSHA256 string `yaml:"enrol_sha256"`
}

// reader turns a document into a Config and collects what is wrong with it.
type reader struct {
	locators []*policy.Locator // of the file, then of those that it includes
	sources  []policy.Source   // what each of them says about jobs
	dir      string
	broken   []policy.Finding // files that cannot even be read
}

// fail notes a mistake at a YAML path of the main file.
func (r *reader) fail(path, message, next string) {
	r.locators[0].Add(policy.Mistake, "", path, message, next)
}

// findings gives what was found, file by file.
func (r *reader) findings() []policy.Finding {
	var all []policy.Finding
	for _, l := range r.locators {
		all = append(all, l.Findings()...)
	}
	return append(all, r.broken...)
}

func (r *reader) read(d *document) *Config {
	c := &Config{File: r.locators[0].File, InsecureHTTP: d.InsecureHTTP}
	c.URL = r.publicURL(d.URL, d.InsecureHTTP)
	c.TrustedProxies = r.proxies(d.TrustedProxies)
	c.ACME = r.acme(d, c.URL)
	c.TLS, c.Listen = r.listener(d)
	c.UDP, c.Probe = r.ports(d)
	c.ProbeChosen = d.Probe != ""
	c.Relay = r.relay(d.Relay)
	c.Relays = r.relays(d.Relays, d.InsecureHTTP)
	c.State = r.state(d.State)
	c.Audit = r.audit(d.Audit)
	c.Private = r.private(d.Private, c.Listen)
	c.Limits = r.requestLimits(d.Limits)
	c.Issuers = r.issuers(d.Issuers, d.InsecureHTTP)
	c.Networks = r.networks(d.Networks, d.InsecureHTTP)
	r.oneKeySet(c)
	c.STUN = r.stun(d.STUN)
	c.Lease = r.lease(d.Lease)
	c.Downloads = r.path(d.Downloads)
	r.policy(c, d)
	return c
}

func (r *reader) publicURL(s string, insecure bool) string {
	const path = "$.url"
	if s == "" {
		r.fail(path, "url is missing", "set url to the address at which clients reach this coordinator, such as https://culvert.example.com")
		return ""
	}
	u := r.webURL(path, s, insecure)
	if u == nil {
		return ""
	}
	if strings.Contains(strings.ToLower(s), "github.com") {
		r.fail(path, "GitHub refuses to sign tokens for an audience that contains github.com", "serve the coordinator under another name")
	}
	return strings.TrimRight(s, "/")
}

// webURL checks an absolute http(s) URL without credentials, query or fragment; nil where it is wrong.
func (r *reader) webURL(path, s string, insecure bool) *url.URL {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http"):
		r.fail(path, strconv.Quote(s)+" is not an http or https URL", "write it like https://culvert.example.com")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.HasSuffix(s, "?") || strings.HasSuffix(s, "#"):
		r.fail(path, "the URL carries credentials, a query or a fragment", "write it like https://culvert.example.com")
	case u.Scheme == "http" && !insecure && !Loopback(u.Hostname()):
		r.fail(path, "plain http is taken for loopback only", "use https, or set insecure_http: true where the network between is trusted")
	default:
		return u
	}
	return nil
}

// Loopback reports whether host is this machine itself.
func Loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

func (r *reader) proxies(list []string) []netip.Prefix {
	var out []netip.Prefix
	for i, s := range list {
		p, err := prefixOrAddr(s)
		if err != nil {
			r.fail(fmt.Sprintf("$.trusted_proxies[%d]", i), strconv.Quote(s)+" is neither an address nor a CIDR", "write it like 10.0.0.0/8")
			continue
		}
		out = append(out, p)
	}
	return out
}

func prefixOrAddr(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

func (r *reader) listener(d *document) (*TLS, string) {
	listen := r.address("$.listen", d.Listen, DefaultListen)
	if d.TLS != nil {
		if d.TLS.Cert == "" || d.TLS.Key == "" {
			r.fail("$.tls", "tls needs both cert and key", "give tls: {cert: FILE, key: FILE}")
		}
		return &TLS{Cert: r.path(d.TLS.Cert), Key: r.path(d.TLS.Key)}, listen
	}
	host, _, _ := net.SplitHostPort(listen)
	if d.ACME == nil && !Loopback(host) && len(d.TrustedProxies) == 0 && !d.InsecureHTTP {
		r.fail("$.listen", "without tls, only loopback is listened on", "give tls: {cert: FILE, key: FILE} or acme: {email: ADDRESS}, name the proxy that terminates TLS in trusted_proxies, or set insecure_http: true")
	}
	return nil, listen
}

// address checks "host:port" to listen on, where the host may be empty.
func (r *reader) address(path, s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	host, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err == nil && host != "" && !Loopback(host) {
		_, err = netip.ParseAddr(host)
	}
	if err != nil {
		r.fail(path, strconv.Quote(s)+" is not an address to listen on", "write it like :443 or 127.0.0.1:8080")
	}
	return s
}

func (r *reader) state(s State) State {
	switch {
	case s.Dir == "" && len(s.NATS) == 0:
		r.fail("$.state", "state has no place", "set state: {dir: DIR}, or {nats: [URL, …]} for an existing cluster")
	case s.Dir != "" && len(s.NATS) > 0:
		r.fail("$.state", "state has both dir and nats", "keep one: dir for the embedded store, nats for an existing cluster")
	case s.Credentials != "" && len(s.NATS) == 0:
		r.fail("$.state.credentials", "credentials without nats", "credentials belong to an existing cluster; remove them")
	case s.Elections != "" && len(s.NATS) == 0:
		r.fail("$.state.elections", "elections without nats", "they are an existing cluster's; remove it")
	}
	for i, u := range s.NATS {
		if parsed, err := url.Parse(u); err != nil || parsed.Host == "" || parsed.User != nil {
			r.fail(fmt.Sprintf("$.state.nats[%d]", i), "not a NATS URL, or one with credentials in it", "write it like tls://n1:4222, and keep credentials in their own file")
		}
	}
	return State{Dir: r.path(s.Dir), NATS: s.NATS, Credentials: r.path(s.Credentials), Elections: r.path(s.Elections)}
}

func (r *reader) issuers(list []issuerDoc, insecure bool) []claims.Issuer {
	if len(list) == 0 {
		return []claims.Issuer{{URL: claims.GitHub}}
	}
	out := make([]claims.Issuer, 0, len(list))
	names := map[string]bool{}
	for i, d := range list {
		path := fmt.Sprintf("$.issuers[%d]", i)
		if r.webURL(path+".url", d.URL, insecure) != nil {
			r.githubIssuer(path+".url", d.URL)
		}
		if slices.ContainsFunc(out, func(other claims.Issuer) bool { return other.URL == d.URL }) {
			r.fail(path+".url", "the issuer is listed twice", "keep one of them")
		}
		switch {
		case d.Name == "":
		case !networkName.MatchString(d.Name):
			r.fail(path+".name", strconv.Quote(d.Name)+" is no name for an issuer", "use up to 63 lower-case letters, digits and inner hyphens")
		case names[d.Name]:
			r.fail(path+".name", fmt.Sprintf("the name %q is another issuer's as well", d.Name), "give every issuer its own name")
		}
		names[d.Name] = true
		out = append(out, claims.Issuer{URL: d.URL, JWKSFile: r.path(d.JWKSFile)})
	}
	return out
}

// githubIssuer refuses URLs of GitHub's that none of its tokens carries as iss.
func (r *reader) githubIssuer(path, s string) {
	u, err := url.Parse(s)
	if err != nil {
		return
	}
	host := strings.ToLower(u.Host)
	switch ours := strings.HasSuffix(host, ".githubusercontent.com") || strings.HasSuffix(host, ".ghe.com") || strings.HasSuffix(u.Path, "/_services/token/"); {
	case host == "github.com" || host == "www.github.com" || host == "api.github.com":
		r.fail(path, strconv.Quote(s)+" signs no tokens for jobs", "write "+claims.GitHub+", or that with your enterprise's slug behind it")
	case strings.HasSuffix(host, ".ghe.com") && !strings.HasPrefix(host, "token.actions."):
		r.fail(path, strconv.Quote(s)+" signs no tokens for jobs", "write https://token.actions."+host)
	case ours && (strings.HasSuffix(s, "/") || host != u.Host):
		r.fail(path, strconv.Quote(s)+" is not spelt as GitHub's tokens spell it, so none would be taken", "write "+strings.ToLower(strings.TrimRight(s, "/")))
	}
}

// networkName is what a network may be called: it stands in flags, headers and log lines.
var networkName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (r *reader) networks(docs map[string]networkDoc, insecure bool) map[string]Network {
	if len(docs) == 0 {
		r.fail("$.networks", "there is no network", "name at least one under networks, with its gateways")
	}
	out := make(map[string]Network, len(docs))
	for _, name := range slices.Sorted(maps.Keys(docs)) {
		path := "$.networks." + name
		if !networkName.MatchString(name) {
			r.fail("$.networks", strconv.Quote(name)+" is no name for a network", "use up to 63 lower-case letters, digits and inner hyphens")
			continue
		}
		out[name] = r.network(path, docs[name], insecure)
	}
	return out
}

func (r *reader) network(path string, d networkDoc, insecure bool) Network {
	n := Network{
		Sessions: r.overlay(path+".sessions", d.Sessions, DefaultSessions),
		Services: r.overlay(path+".services", d.Services, DefaultServices),
	}
	if n.Sessions.Overlaps(n.Services) {
		r.fail(path, fmt.Sprintf("sessions %s and services %s overlap", n.Sessions, n.Services), "give them ranges of their own")
	}
	if len(d.Gateways) == 0 {
		r.fail(path, "nobody may be this network's gateway", "add gateways: [{issuer: URL, subject: SUBJECT}] or [{enrol_sha256: HASH}]")
	}
	for i, g := range d.Gateways {
		n.Gateways = append(n.Gateways, r.enrolment(fmt.Sprintf("%s.gateways[%d]", path, i), g, insecure))
	}
	return n
}

// oneKeySet refuses an issuer of gateways whose keys would come from two places.
func (r *reader) oneKeySet(c *Config) {
	files := map[string]string{}
	for _, name := range c.NetworkNames() {
		for i, e := range c.Networks[name].Gateways {
			if file, ok := files[e.Issuer]; ok && e.Issuer != "" && file != e.JWKSFile {
				r.fail(fmt.Sprintf("$.networks.%s.gateways[%d]", name, i), "the issuer has another jwks_file elsewhere", "give it the same one everywhere")
			}
			files[e.Issuer] = e.JWKSFile
		}
	}
}

// overlay checks a range of overlay addresses: IPv4, a gateway and a few sessions at least.
func (r *reader) overlay(path, s string, otherwise netip.Prefix) netip.Prefix {
	if s == "" {
		return otherwise
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 29 {
		r.fail(path, strconv.Quote(s)+" is no IPv4 range between /8 and /29", "write it like 198.18.0.0/16")
		return otherwise
	}
	if p != p.Masked() {
		r.fail(path, fmt.Sprintf("%s has bits set after its prefix", p), "write "+p.Masked().String())
	}
	return p
}

func (r *reader) enrolment(path string, d enrolmentDoc, insecure bool) Enrolment {
	identity := d.Issuer != "" || d.Subject != "" || d.JWKSFile != ""
	if identity == (d.EnrolSHA256 != "") {
		r.fail(path, "a gateway is known either by issuer and subject, or by enrol_sha256", "keep one of the two")
		return Enrolment{}
	}
	if identity {
		r.webURL(path+".issuer", d.Issuer, insecure)
		if d.Subject == "" {
			r.fail(path, "an issuer without a subject would let everybody it knows be a gateway", "add subject, such as system:serviceaccount:culvert:gateway")
		}
		return Enrolment{Issuer: d.Issuer, Subject: d.Subject, JWKSFile: r.path(d.JWKSFile)}
	}
	e := Enrolment{}
	sum, err := hex.DecodeString(d.EnrolSHA256)
	if err != nil || len(sum) != len(e.SecretSHA256) {
		r.fail(path+".enrol_sha256", "not a SHA-256 in hexadecimal", "write the 64 digits of: tr -d '\\n' < SECRET-FILE | sha256sum")
		return e
	}
	e.SecretSHA256 = [32]byte(sum)
	return e
}

func (r *reader) stun(list []string) []string {
	for i, s := range list {
		_, port, err := net.SplitHostPort(s)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 {
			r.fail(fmt.Sprintf("$.stun[%d]", i), strconv.Quote(s)+" is not host:port", "write it like stun.example.com:3478")
		}
	}
	return list
}

func (r *reader) lease(d time.Duration) time.Duration {
	if d == 0 {
		return DefaultLease
	}
	if d < MinLease || d > MaxLease {
		r.fail("$.lease", fmt.Sprintf("a lease of %s is not between %s and %s", d, MinLease, MaxLease), "write it like 10m")
	}
	return d
}

// NetworkNames lists the networks in alphabetical order.
func (c *Config) NetworkNames() []string { return slices.Sorted(maps.Keys(c.Networks)) }

// path makes a file's name absolute or relative to where the configuration lies.
func (r *reader) path(p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(r.dir, p)
}

func readAll(f io.Reader, limit int64) ([]byte, error) { return io.ReadAll(io.LimitReader(f, limit)) }

// cause is an error without the path that a *fs.PathError repeats.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
