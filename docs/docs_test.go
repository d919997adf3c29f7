// Package docs has no code: it holds the documentation to what is there.
package docs

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// pages are all Markdown files of the project, by path from this folder.
func pages(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, pattern := range []string{"../*.md", "*.md", "adr/*.md", "../deploy/*.md", "../deploy/*/*.md", "../deploy/*/*/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			out[filepath.Clean(filepath.Join("../docs", f))] = string(text)
		}
	}
	if len(out) < 10 {
		t.Fatalf("found %d pages", len(out))
	}
	return out
}

var (
	codeBlock = regexp.MustCompile("(?ms)^```.*?^```$|^    [^\n]*$")
	code      = regexp.MustCompile("`[^`\n]*`")
	link      = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading   = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	unslugged = regexp.MustCompile("[^a-z0-9 _-]")
)

// slugs are the anchors of a page's headings, as GitHub makes them.
func slugs(text string) []string {
	var out []string
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		words := unslugged.ReplaceAllString(strings.ToLower(m[1]), "")
		out = append(out, strings.ReplaceAll(words, " ", "-"))
	}
	return out
}

// TestLinks: every link to a file leads to one, and every link to a heading to one. Links to other sites are not followed.
func TestLinks(t *testing.T) {
	all := pages(t)
	for page, text := range all {
		prose := code.ReplaceAllString(codeBlock.ReplaceAllString(text, ""), "")
		for _, m := range link.FindAllStringSubmatch(prose, -1) {
			to, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(to, "://") || strings.HasPrefix(to, "mailto:") {
				continue
			}
			target := page
			if to != "" {
				target = filepath.Join(filepath.Dir(page), to)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which is not there", page, m[1])
			} else if anchor != "" && !slices.Contains(slugs(all[target]), anchor) {
				t.Errorf("%s links to %s, and no heading of that page is so called", page, m[1])
			}
		}
	}
}

// TestEveryErrorHasAdvice: each code of errors.md has a heading of its own in troubleshooting.md, and there are no others.
func TestEveryErrorHasAdvice(t *testing.T) {
	all := pages(t)
	var listed, advised []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|").FindAllStringSubmatch(all["../docs/errors.md"], -1) {
		listed = append(listed, m[1])
	}
	for _, m := range regexp.MustCompile("(?m)^### (.*)$").FindAllStringSubmatch(all["../docs/troubleshooting.md"], -1) {
		for _, c := range regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(m[1], -1) {
			advised = append(advised, c[1])
		}
	}
	slices.Sort(listed)
	slices.Sort(advised)
	if len(listed) < 30 || !slices.Equal(listed, advised) {
		t.Errorf("errors.md lists\n%q\nand troubleshooting.md has advice on\n%q", listed, advised)
	}
}

var (
	command = regexp.MustCompile(`(?:^|[\s` + "`" + `(])(culvert(?:-coordinator|-gateway)?) +([^` + "`" + `\n]*)`)
	flag    = regexp.MustCompile(`(?:^|\s)--([a-z][a-z-]*)`)
	lower   = regexp.MustCompile(`^[a-z]+$`)
	making  = regexp.MustCompile(`(?m)(?:^ *|` + "`" + `|&& )make (?:-C [a-z]+ )?([a-z][a-z -]*)`)
	target  = regexp.MustCompile(`(?m)^([a-z-]+):`)
)

// TestMakeTargets: what the documentation has made, the Makefile makes.
func TestMakeTargets(t *testing.T) {
	file, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, m := range target.FindAllStringSubmatch(string(file), -1) {
		there[m[1]] = true
	}
	seen := 0
	for page, text := range pages(t) {
		for _, where := range append(codeBlock.FindAllString(text, -1), code.FindAllString(codeBlock.ReplaceAllString(text, ""), -1)...) {
			for _, m := range making.FindAllStringSubmatch(where, -1) {
				for _, name := range strings.Fields(m[1]) {
					if seen++; !there[name] {
						t.Errorf("%s: the Makefile makes no %q: %q", page, name, strings.TrimSpace(where))
					}
				}
			}
		}
	}
	if seen < 20 {
		t.Errorf("found %d targets", seen)
	}
}

// TestCommands: every command line in the documentation names a command that exists, with flags that it has.
func TestCommands(t *testing.T) {
	bin := programs(t)
	help := map[string]string{}
	seen := 0
	for page, text := range pages(t) {
		for _, where := range append(codeBlock.FindAllString(text, -1), code.FindAllString(codeBlock.ReplaceAllString(text, ""), -1)...) {
			for _, m := range command.FindAllStringSubmatch(strings.ReplaceAll(where, " -C culvert ", " "), -1) {
				line, _, _ := strings.Cut(m[2], " # ")
				ours, _, _ := strings.Cut(line, " -- ") // what follows is another program's
				words := strings.Fields(ours)
				path := subcommand(t, bin, help, m[1], words)
				if path == "" {
					if len(words) > 0 && lower.MatchString(words[0]) && words[0] != "is" {
						t.Errorf("%s: %s has no command %q: %q", page, m[1], words[0], strings.TrimSpace(where))
					}
					continue
				}
				seen++
				for _, f := range flag.FindAllStringSubmatch(ours, -1) {
					if name := strings.TrimPrefix(f[1], "no-"); !strings.Contains(help[path], "--"+f[1]) && !strings.Contains(help[path], "--[no-]"+name) {
						t.Errorf("%s: %s has no flag --%s: %q", page, path, f[1], strings.TrimSpace(where))
					}
				}
			}
		}
	}
	if seen < 40 {
		t.Errorf("found %d command lines", seen)
	}
}

// whole is a culvert.yaml that lacks nothing.
const whole = `
url: https://culvert.example.com
tls: {cert: tls.crt, key: tls.key}
state: {dir: state}
networks: {corp: {gateways: [{enrol_sha256: "0000000000000000000000000000000000000000000000000000000000000000"}]}}
rules:
  - {name: shop, match: {repository_owner_id: 9919, ref: refs/heads/main, runner_environment: github-hosted}, allow: ["tcp 10.20.0.5:80"]}
`

// TestConfigurations: what the pages show of culvert.yaml is taken by the coordinator, put into a whole file where it is a part of one.
// The policy guide and the quickstart have tests of their own.
func TestConfigurations(t *testing.T) {
	bin, seen := programs(t), 0
	for page, text := range pages(t) {
		for _, m := range regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
			file := part(m[1])
			if file == nil {
				continue
			}
			seen++
			dir := t.TempDir()
			path := filepath.Join(dir, "culvert.yaml")
			data, err := yaml.Marshal(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(filepath.Join(bin, "culvert-coordinator"), "check", path).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s\n%s", page, err, out, data)
			}
		}
	}
	if seen < 5 {
		t.Errorf("found %d", seen)
	}
}

// part is a whole file with what a block says in place of its own; nil where the block is no part of a culvert.yaml.
func part(block string) map[string]any {
	var shown, file map[string]any
	if yaml.Unmarshal([]byte(block), &shown) != nil || yaml.Unmarshal([]byte(whole), &file) != nil {
		return nil
	}
	for key, value := range shown {
		if !slices.Contains([]string{"url", "listen", "udp", "tls", "acme", "state", "trusted_proxies", "relays", "networks", "rules", "limits", "issuers"}, key) {
			return nil
		}
		file[key] = value
	}
	if shown["acme"] != nil || shown["trusted_proxies"] != nil {
		delete(file, "tls")
	}
	return file
}

// TestEveryKeyHasItsRow: configuration.md has each key of the two files, as their schemas have them, and no other.
func TestEveryKeyHasItsRow(t *testing.T) {
	bin := programs(t)
	page := pages(t)["../docs/configuration.md"]
	for file, least := range map[string]int{"config": 40, "relay": 12} {
		out, err := exec.Command(filepath.Join(bin, "culvert-coordinator"), "schema", file).Output()
		if err != nil {
			t.Fatal(err)
		}
		var root schema
		if err := json.Unmarshal(out, &root); err != nil {
			t.Fatal(err)
		}
		want := root.keys(root.Defs, "")
		_, table, _ := strings.Cut(page, "<!-- "+file+" -->")
		table, _, _ = strings.Cut(table, "<!-- end of "+file+" -->")
		var got []string
		for _, row := range regexp.MustCompile(`(?m)^\| (`+"`"+`[^|]*`+"`"+`) \|`).FindAllStringSubmatch(table, -1) {
			for _, key := range strings.Split(row[1], ", ") {
				got = append(got, strings.Trim(key, "`"))
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if len(got) < least || !slices.Equal(got, want) {
			t.Errorf("configuration.md has rows for\n%q\nand the keys of %s are\n%q", got, file, want)
		}
	}
}

// schema is what of a JSON Schema says which keys there are.
type schema struct {
	Ref        string            `json:"$ref"`
	Defs       map[string]schema `json:"$defs"`
	Properties map[string]schema `json:"properties"`
	AnyOf      []schema          `json:"anyOf"`
	Items      *schema           `json:"items"`
	Additional json.RawMessage   `json:"additionalProperties"`
}

// keys are the leaves as the page writes them: a.b, a[].b, and a.NAME.b where names are free. What rules are made of is policy.md's.
func (s schema) keys(defs map[string]schema, path string) []string {
	if name, ok := strings.CutPrefix(s.Ref, "#/$defs/"); ok {
		s = defs[name]
	}
	var free schema
	switch {
	case path == "rules" || path == "groups" || path == "targets":
	case s.Items != nil && (s.Items.Ref != "" || s.Items.Properties != nil):
		return s.Items.keys(defs, path+"[]")
	case json.Unmarshal(s.Additional, &free) == nil && free.Ref != "":
		return free.keys(defs, path+".NAME")
	case len(s.AnyOf) > 0 && s.AnyOf[0].Properties != nil:
		return s.AnyOf[0].keys(defs, path)
	case s.Properties != nil:
		var out []string
		for key, property := range s.Properties {
			out = append(out, property.keys(defs, strings.TrimPrefix(path+"."+key, "."))...)
		}
		return out
	}
	return []string{path}
}

// subcommand finds the longest run of words that is a command of a program, and keeps its help. It is empty where the words are
// prose, such as "culvert is".
func subcommand(t *testing.T, bin string, help map[string]string, program string, words []string) string {
	t.Helper()
	path := program
	if _, ok := help[path]; !ok {
		help[path] = ask(bin, program)
	}
	found := ""
	for _, w := range words {
		next := path + " " + w
		if !lower.MatchString(w) || !strings.Contains(help[path], "\n  "+strings.TrimPrefix(next, program+" ")) {
			break
		}
		if _, ok := help[next]; !ok {
			help[next] = ask(bin, program, strings.Fields(next)[1:]...)
		}
		path, found = next, next
	}
	return found
}

func ask(bin, program string, args ...string) string {
	out, _ := exec.Command(filepath.Join(bin, program), append(args, "--help")...).CombinedOutput()
	return string(out)
}

// programs is a folder with the three programs: the one that the environment names, or one built here.
func programs(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("CULVERT_E2E_BIN"); dir != "" {
		return dir
	}
	dir := t.TempDir()
	for name, folder := range map[string]string{"culvert-coordinator": "../coordinator", "culvert-gateway": "../gateway", "culvert": "../client"} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(dir, name), folder).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	return dir
}
