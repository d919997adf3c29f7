package config

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Bounds on what a file may include.
const (
	maxIncluded     = 4096     // files
	maxIncludedSize = 32 << 20 // bytes of all of them
)

// policy compiles the rules of the file and of those that it includes.
func (r *reader) policy(c *Config, d *document) {
	sources := []policy.Source{{File: c.File, Document: d.Document}}
	for _, file := range r.included(d.Include) {
		if doc, ok := r.include(file); ok {
			sources = append(sources, policy.Source{File: file, Document: doc})
			c.Included = append(c.Included, file)
		}
	}
	c.Targets, c.Groups = map[string][]string{}, map[string][]map[string]policy.Values{}
	for i := range sources {
		c.Rules = append(c.Rules, sources[i].Rules...)
		maps.Copy(c.Targets, sources[i].Targets)
		maps.Copy(c.Groups, sources[i].Groups)
	}
	r.sources = sources
	p, faults := policy.CompileAll(sources, policyOptions(c, d))
	for _, f := range faults {
		r.locators[f.Source].Add(policy.Mistake, "", f.Path, f.Message, f.Next)
	}
	c.Policy = p
}

// lint adds what is dangerous or useless.
func (r *reader) lint(c *Config) {
	if c.Policy == nil {
		return
	}
	for _, w := range policy.Lint(c.Policy, r.sources, time.Now()) {
		r.locators[w.Source].Add(policy.Warning, w.Code, w.Path, w.Message, w.Next)
	}
	for i, issuer := range c.Issuers {
		if len(c.Issuers) > 1 && !c.Policy.Serves(issuer.URL) {
			r.locators[0].Add(policy.Warning, policy.UnusedIssuer, fmt.Sprintf("$.issuers[%d].url", i),
				fmt.Sprintf("no rule is for tokens of %s", issuer.URL), "name it as iss in a rule's match, or remove it")
		}
	}
}

// lintFiles looks whether the files that a configuration names are there. It is no mistake of the configuration where they are not: `check` may run
// on another machine, or as somebody who may not read a key.
func (r *reader) lintFiles(c *Config) {
	r.lintTLS(c.TLS)
	if c.ACME != nil {
		r.lintFile("$.acme.roots", c.ACME.Roots)
	}
	r.lintFile("$.state.credentials", c.State.Credentials)
	r.lintFile("$.state.elections", c.State.Elections)
	r.lintFile("$.audit.key", c.Audit.KeyFile)
	r.lintFile("$.downloads", c.Downloads)
	for i, issuer := range c.Issuers {
		r.lintFile(fmt.Sprintf("$.issuers[%d].jwks_file", i), issuer.JWKSFile)
	}
	for _, name := range c.NetworkNames() {
		for i, g := range c.Networks[name].Gateways {
			r.lintFile(fmt.Sprintf("$.networks.%s.gateways[%d].jwks_file", name, i), g.JWKSFile)
		}
	}
}

func (r *reader) lintTLS(t *TLS) {
	if t != nil {
		r.lintFile("$.tls.cert", t.Cert)
		r.lintFile("$.tls.key", t.Key)
	}
}

func (r *reader) lintFile(path, file string) {
	if file == "" {
		return
	}
	f, err := os.Open(file)
	if err == nil {
		_ = f.Close()
		return
	}
	r.locators[0].Add(policy.Warning, policy.FileMissing, path, fmt.Sprintf("%s cannot be read: %v", file, cause(err)),
		"put it there, or correct the path; check on the machine that it is for, as the user that it is for")
}

func policyOptions(c *Config, d *document) policy.Options {
	opts := policy.Options{Networks: c.NetworkNames(), IssuerNames: map[string]string{}}
	for _, i := range c.Issuers {
		opts.Issuers = append(opts.Issuers, i.URL)
	}
	for _, i := range d.Issuers {
		if i.Name != "" {
			opts.IssuerNames[i.Name] = i.URL
		}
	}
	return opts
}

// include reads one included file; ok is false where it does not even parse.
func (r *reader) include(file string) (doc policy.Document, ok bool) {
	data, err := readBounded(file)
	if err != nil {
		r.unreadable(file, err)
		return doc, false
	}
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		r.broken = append(r.broken, policy.FromProblem(file, err))
		return doc, false
	}
	l := &policy.Locator{File: file, Document: parsed}
	l.Decode(&doc)
	r.locators = append(r.locators, l)
	return doc, true
}

func (r *reader) unreadable(file string, err error) {
	r.broken = append(r.broken, policy.Finding{
		Severity: policy.Mistake, File: file, Message: fmt.Sprintf("cannot be read: %v", cause(err)),
		Next: "check the file and who may read it, or take it out of the folder",
	})
}

// included lists the files that the configuration includes: those named, and of folders all whose name ends in .yaml or
// .yml and does not begin with a dot, in alphabetical order.
func (r *reader) included(list policy.Values) []string {
	var files []string
	size := int64(0)
	for i, name := range list {
		path := "$.include"
		if len(list) > 1 {
			path = fmt.Sprintf("$.include[%d]", i)
		}
		found, bytes, err := expand(r.path(name))
		if err != nil || name == "" {
			r.fail(path, fmt.Sprintf("%q cannot be included: %v", name, cause(err)), "name a file, or a folder of files, relative to this one")
			continue
		}
		for _, f := range found {
			if slices.Contains(files, f) {
				r.fail(path, f+" is included twice", "name it once")
				continue
			}
			files = append(files, f)
		}
		size += bytes
	}
	if len(files) > maxIncluded || size > maxIncludedSize {
		r.fail("$.include", fmt.Sprintf("%d files with %d bytes are more than may be included", len(files), size), "put rules of a kind into one file, with groups and targets")
		return nil
	}
	return files
}

// Includes lists the files and folders that a configuration includes, as far as it can be read: what to watch for changes.
func Includes(file string, data []byte) []string {
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		return nil
	}
	var d struct {
		Include policy.Values `yaml:"include"`
	}
	parsed.Decode(&d)
	r := &reader{dir: filepath.Dir(file)}
	out := make([]string, len(d.Include))
	for i, name := range d.Include {
		out[i] = r.path(name)
	}
	return out
}

// Expand lists the files behind what [Includes] gives, as they are at the moment; what is not there is left out.
func Expand(includes []string) []string {
	var files []string
	for _, name := range includes {
		found, _, _ := expand(name)
		files = append(files, found...)
	}
	return files
}

// expand gives the files behind one entry of include, and their size.
func expand(name string) (files []string, size int64, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, 0, err
	}
	if !info.IsDir() {
		return []string{name}, info.Size(), nil
	}
	entries, err := os.ReadDir(name) // sorted
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		if !isRuleFile(e.Name()) {
			continue
		}
		file := filepath.Join(name, e.Name())
		info, err := os.Stat(file) // through links: a mounted ConfigMap consists of them
		if err != nil {
			return nil, 0, err
		}
		if info.Mode().IsRegular() {
			files, size = append(files, file), size+info.Size()
		}
	}
	return files, size, nil
}

func isRuleFile(name string) bool {
	ext := filepath.Ext(name)
	return !strings.HasPrefix(name, ".") && (ext == ".yaml" || ext == ".yml")
}
