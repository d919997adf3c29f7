// Package check has no code: it holds the examples for clouds to what they promise and to the table of what Culvert needs. A module of
// its own, with HCL's and TOML's parsers.
package check

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/culvertnet/culvert/internal/requirements"
)

// files are a folder's .tf files, parsed.
func files(t *testing.T, dir string) map[string]*hclsyntax.Body {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.tf"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no files in %s: %v", dir, err)
	}
	out := map[string]*hclsyntax.Body{}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f, diags := hclsyntax.ParseConfig(text, name, hcl.InitialPos)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		if !bytes.Equal(hclwrite.Format(text), text) {
			t.Errorf("%s is not formatted", name)
		}
		out[name] = f.Body.(*hclsyntax.Body)
	}
	return out
}

// blocks gives the blocks of a type, by their labels.
func blocks(all map[string]*hclsyntax.Body, kind string) map[string]*hclsyntax.Block {
	out := map[string]*hclsyntax.Block{}
	for _, body := range all {
		for _, b := range body.Blocks {
			if b.Type == kind {
				out[strings.Join(b.Labels, ".")] = b
			}
		}
	}
	return out
}

// references are the names that expressions of the files speak of: var.url, aws_eip.coordinator, data.aws_subnet.public …
func references(all map[string]*hclsyntax.Body) map[string]bool {
	out := map[string]bool{}
	for _, body := range all {
		_ = hclsyntax.VisitAll(body, func(n hclsyntax.Node) hcl.Diagnostics {
			if e, ok := n.(*hclsyntax.ScopeTraversalExpr); ok {
				out[name(e.Traversal)] = true
			}
			return nil
		})
	}
	return out
}

func name(tr hcl.Traversal) string {
	parts := []string{tr.RootName()}
	length := 2
	if tr.RootName() == "data" {
		length = 3
	}
	for _, step := range tr[1:] {
		if a, ok := step.(hcl.TraverseAttr); ok && len(parts) < length {
			parts = append(parts, a.Name)
		}
	}
	return strings.Join(parts, ".")
}

// TestNames: whatever is spoken of is there, and what is there is spoken of.
func TestNames(t *testing.T) {
	all := files(t, "../aws")
	there := map[string]bool{"path.module": true}
	for label := range blocks(all, "variable") {
		there["var."+label] = true
	}
	for label := range blocks(all, "resource") {
		there[label] = true
	}
	for label := range blocks(all, "data") {
		there["data."+label] = true
	}
	for _, b := range blocks(all, "locals") {
		for n := range b.Body.Attributes {
			there["local."+n] = true
		}
	}
	used := references(all)
	for n := range used {
		root, _, dotted := strings.Cut(n, ".")
		if dotted && !there[n] && root != "each" && root != "t" { // without a dot it is a type, or an attribute of the resource itself
			t.Errorf("%s is spoken of and not there", n)
		}
	}
	for n := range there {
		if (strings.HasPrefix(n, "var.") || strings.HasPrefix(n, "local.") || strings.HasPrefix(n, "data.")) && !used[n] {
			t.Errorf("%s is there and not spoken of", n)
		}
	}
}

// value is an attribute's, [cty.NilVal] where there is none or it takes a variable.
func value(t *testing.T, b *hclsyntax.Body, attribute string) cty.Value {
	t.Helper()
	a := b.Attributes[attribute]
	if a == nil || len(a.Expr.Variables()) > 0 {
		return cty.NilVal
	}
	v, diags := a.Expr.Value(nil)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return v
}

func text(t *testing.T, b *hclsyntax.Body, attribute string) string {
	t.Helper()
	if v := value(t, b, attribute); v != cty.NilVal && v.Type() == cty.String {
		return v.AsString()
	}
	return ""
}

// TestMachines: metadata by session alone and one hop away, disks encrypted, no key to log in with, no password in what they are told.
func TestMachines(t *testing.T) {
	machines := 0
	for label, b := range blocks(files(t, "../aws"), "resource") {
		if !strings.HasPrefix(label, "aws_instance.") {
			continue
		}
		machines++
		seen := 0
		for _, inner := range b.Body.Blocks {
			switch inner.Type {
			case "metadata_options":
				seen++
				if text(t, inner.Body, "http_tokens") != "required" || !value(t, inner.Body, "http_put_response_hop_limit").RawEquals(cty.NumberIntVal(1)) {
					t.Errorf("%s takes more than IMDSv2 from one hop", label)
				}
			case "root_block_device":
				seen++
				if !value(t, inner.Body, "encrypted").RawEquals(cty.True) {
					t.Errorf("%s: its disk is in the clear", label)
				}
			}
		}
		if seen != 2 || b.Body.Attributes["key_name"] != nil {
			t.Errorf("%s lacks its metadata options or its disk, or can be logged in to", label)
		}
		public := value(t, b.Body, "associate_public_ip_address")
		if gateway := label == "aws_instance.gateway"; public.RawEquals(cty.True) == gateway {
			t.Errorf("%s has a public address: %#v", label, public)
		}
	}
	if machines != 2 {
		t.Errorf("%d machines", machines)
	}
}

// port finds the numbers of the table's default ports.
var port = regexp.MustCompile(`^\d+`)

// required are the ports that the table has a party take connections on, without what only an operator's choice opens.
func required(party requirements.Party) map[string]bool {
	out := map[string]bool{}
	for _, r := range requirements.For(party) {
		optional := strings.HasPrefix(r.When, "with ") || strings.HasPrefix(r.When, "only with ")
		if r.Direction == requirements.In && !optional {
			out[strings.ToLower(r.Protocol)+" "+port.FindString(r.Port)] = true
		}
	}
	return out
}

// TestSecurityGroups: the coordinator's lets in what the table says, the gateway's nothing.
func TestSecurityGroups(t *testing.T) {
	open := map[string]bool{}
	for label, b := range blocks(files(t, "../aws"), "resource") {
		switch {
		case strings.HasPrefix(label, "aws_security_group."):
			if len(b.Body.Blocks) > 0 || b.Body.Attributes["ingress"] != nil || b.Body.Attributes["egress"] != nil {
				t.Errorf("%s has rules inside", label)
			}
		case strings.HasPrefix(label, "aws_vpc_security_group_ingress_rule."):
			if to := name(b.Body.Attributes["security_group_id"].Expr.(*hclsyntax.ScopeTraversalExpr).Traversal); to != "aws_security_group.coordinator" {
				t.Errorf("%s lets something in to %s", label, to)
			}
			from, _ := value(t, b.Body, "from_port").AsBigFloat().Int64()
			to, _ := value(t, b.Body, "to_port").AsBigFloat().Int64()
			for p := from; p <= to && p < from+10; p++ {
				open[fmt.Sprintf("%s %d", text(t, b.Body, "ip_protocol"), p)] = true
			}
		case strings.HasPrefix(label, "aws_vpc_security_group_egress_rule.") && text(t, b.Body, "ip_protocol") == "-1":
			t.Errorf("%s lets everything out", label)
		}
	}
	if want := required(requirements.Coordinator); !maps.Equal(open, want) {
		t.Errorf("the coordinator is open on %v, and the table says %v", slices.Sorted(maps.Keys(open)), slices.Sorted(maps.Keys(want)))
	}
	if want := required(requirements.Gateway); len(want) != 0 {
		t.Errorf("the table has a gateway take connections on %v", want)
	}
}

// TestPolicies: no statement has a wildcard, and the only role is the gateway's.
func TestPolicies(t *testing.T) {
	all := files(t, "../aws")
	for label, b := range blocks(all, "data") {
		if !strings.HasPrefix(label, "aws_iam_policy_document.") {
			continue
		}
		for _, s := range b.Body.Blocks {
			source, err := os.ReadFile(s.Body.SrcRange.Filename)
			if err != nil {
				t.Fatal(err)
			}
			if said := s.Body.SrcRange.SliceBytes(source); bytes.ContainsRune(said, '*') {
				t.Errorf("%s has a wildcard:\n%s", label, said)
			}
		}
	}
	for label := range blocks(all, "resource") {
		if strings.HasPrefix(label, "aws_iam_role.") && label != "aws_iam_role.gateway" {
			t.Errorf("%s: only the gateway needs a role", label)
		}
	}
}

var parameters = map[string]string{
	"archive": "https://example.com/a.tar.gz", "sha256": strings.Repeat("a", 64), "url": "https://culvert.example.com", "email": "ops@example.com", "network": "corp",
	"owner": "9919", "parameter": "/culvert/enrol", "region": "eu-central-1", "configuration": `networks:
  corp:
    gateways:
      - {enrol_sha256: "` + strings.Repeat("0", 64) + `"}
rules:
  - {name: shop, network: corp, match: {repository_owner_id: 9919}, allow: ["tcp 10.20.0.5:80"]}`,
}

// TestScripts renders what the machines run, has the shell read it, and the coordinator the configuration in it.
func TestScripts(t *testing.T) {
	for _, name := range []string{"coordinator", "gateway"} {
		script := render(t, "../aws/"+name+".sh.tftpl")
		cmd := exec.Command("bash", "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if !strings.Contains(script, "sha256sum --check") || !strings.Contains(script, "set -euo pipefail") {
			t.Errorf("%s installs what it has not checked", name)
		}
		if name == "coordinator" {
			_, rest, _ := strings.Cut(script, "<<'YAML'\n")
			config, _, _ := strings.Cut(rest, "\nYAML\n")
			checked(t, config)
		}
	}
}

func render(t *testing.T, file string) string {
	t.Helper()
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	expr, diags := hclsyntax.ParseTemplate(source, file, hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	vars := map[string]cty.Value{}
	for n, v := range parameters {
		vars[n] = cty.StringVal(v)
	}
	out, diags := expr.Value(&hcl.EvalContext{Variables: vars})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return out.AsString()
}

// checked has the coordinator itself read a configuration.
func checked(t *testing.T, config string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "run", "./coordinator", "check", file)
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s\n%s", err, out, config)
	}
}

// TestFly: the ports are the table's, datagrams keep theirs, and the configuration is one.
func TestFly(t *testing.T) {
	var app struct {
		Services []struct {
			Protocol     string
			InternalPort int `toml:"internal_port"`
			Ports        []struct {
				Port     int
				Handlers []string
			}
		}
		Mounts struct{ Destination string }
	}
	if _, err := toml.DecodeFile("../../fly/fly.toml", &app); err != nil {
		t.Fatal(err)
	}
	open := map[string]bool{}
	for _, s := range app.Services {
		for _, p := range s.Ports {
			open[fmt.Sprintf("%s %d", s.Protocol, p.Port)] = true
			if s.Protocol == "udp" && p.Port != s.InternalPort || len(p.Handlers) > 0 {
				t.Errorf("%+v", s)
			}
		}
	}
	if want := required(requirements.Coordinator); !maps.Equal(open, want) {
		t.Errorf("open on %v, and the table says %v", slices.Sorted(maps.Keys(open)), slices.Sorted(maps.Keys(want)))
	}
	config, err := os.ReadFile("../../fly/culvert.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(config, []byte("state: {dir: "+app.Mounts.Destination+"}")) {
		t.Errorf("the state is not on the volume, which is at %s", app.Mounts.Destination)
	}
	checked(t, string(config))
}
