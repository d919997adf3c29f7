package config

import (
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// LetsEncrypt is the directory of the CA that is asked where the file names none.
const LetsEncrypt = "https://acme-v02.api.letsencrypt.org/directory"

// ACME asks a CA for the certificate of the URL's host (RFC 8555) and renews it. To write it is to accept the CA's terms.
type ACME struct {
	// Email is where the CA writes when something is wrong with the account.
	Email string `yaml:"email" jsonschema:"required"`
	// Directory of the CA; default Let's Encrypt's.
	Directory string `yaml:"directory"`
	// Roots is a PEM file with what the directory's own certificate is verified by, where the system does not know it.
	Roots string `yaml:"roots"`
	// HTTP is the address of a plain listener for the HTTP-01 challenge, such as ":80", for where the CA cannot reach port 443.
	HTTP string `yaml:"http"`
}

// acme checks how certificates are asked for; nil where they are not.
func (r *reader) acme(d *document, publicURL string) *ACME {
	if d.ACME == nil {
		return nil
	}
	a := *d.ACME
	const path = "$.acme"
	if at := strings.IndexByte(a.Email, '@'); at < 1 || at == len(a.Email)-1 || strings.ContainsAny(a.Email, " ,<>:") {
		r.fail(path, strconv.Quote(a.Email)+" is no mail address", "give acme: {email: ADDRESS}, where the CA may write")
	}
	if d.TLS != nil {
		r.fail(path, "there are both tls and acme", "keep tls for a certificate from files, acme for one from a CA")
	}
	if why := noACMEHost(publicURL); why != "" {
		r.fail("$.url", why, "use a name that the CA can look up, or give tls: {cert: FILE, key: FILE}")
	}
	if a.Directory == "" {
		a.Directory = LetsEncrypt
	} else {
		r.webURL(path+".directory", a.Directory, false)
	}
	if a.HTTP != "" {
		r.address(path+".http", a.HTTP, "")
	}
	a.Roots = r.path(a.Roots)
	return &a
}

// noACMEHost says why no CA gives a certificate for a URL, or "". A URL that is wrong altogether is told of elsewhere.
func noACMEHost(s string) string {
	u, err := url.Parse(s)
	if err != nil || s == "" {
		return ""
	}
	host := u.Hostname()
	_, err = netip.ParseAddr(host)
	switch {
	case u.Scheme != "https":
		return "a certificate by ACME is for an https URL"
	case err == nil:
		return "no certificate is asked for an address: " + host
	case !strings.Contains(strings.Trim(host, "."), "."):
		return strconv.Quote(host) + " is no public name"
	case strings.ContainsFunc(host, func(c rune) bool { return c > '~' }):
		return strconv.Quote(host) + " is not in ASCII; write it as DNS has it (xn--…)"
	}
	return ""
}
