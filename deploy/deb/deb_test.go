// Package deb has no code: it looks at the Debian packages that `make packages` has built.
package deb

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// distEnv is a folder that `make dist` has filled.
const distEnv = "CULVERT_DIST"

// packages are the files that each has, with the mode that dpkg-deb --contents shows; folders left out.
var packages = map[string]map[string]string{
	"culvert-coordinator": {
		"/usr/bin/culvert-coordinator":                             "-rwxr-xr-x",
		"/usr/lib/systemd/system/culvert-coordinator.service":      "-rw-r--r--",
		"/usr/lib/systemd/system/culvert-relay.service":            "-rw-r--r--",
		"/usr/lib/sysusers.d/culvert-coordinator.conf":             "-rw-r--r--",
		"/usr/share/doc/culvert-coordinator/examples/culvert.yaml": "-rw-r--r--",
		"/usr/share/doc/culvert-coordinator/copyright":             "-rw-r--r--",
	},
	"culvert-gateway": {
		"/usr/bin/culvert-gateway":                        "-rwxr-xr-x",
		"/usr/lib/systemd/system/culvert-gateway.service": "-rw-r--r--",
		"/usr/lib/sysusers.d/culvert-gateway.conf":        "-rw-r--r--",
		"/usr/lib/sysctl.d/60-culvert-gateway.conf":       "-rw-r--r--",
		"/etc/culvert/gateway.env":                        "-rw-r--r--",
		"/usr/share/doc/culvert-gateway/copyright":        "-rw-r--r--",
	},
}

func dist(t *testing.T, pattern string) []string {
	t.Helper()
	dir := os.Getenv(distEnv)
	if dir == "" {
		t.Skip("make packages runs this")
	}
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) == 0 {
		t.Fatalf("no %s in %s: %v", pattern, dir, err)
	}
	return found
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestPackages reads each package as dpkg does, and unpacks it into a folder.
func TestPackages(t *testing.T) {
	for name, files := range packages {
		archs := map[string]bool{}
		for _, deb := range dist(t, name+"_*.deb") {
			fields := fields(output(t, "dpkg-deb", "--field", deb))
			version, arch := fields["Version"], fields["Architecture"]
			archs[arch] = true
			if filepath.Base(deb) != name+"_"+version+"_"+arch+".deb" || fields["Package"] != name {
				t.Errorf("%s is %s %s for %s", deb, fields["Package"], version, arch)
			}
			for _, f := range []string{"Maintainer", "Description", "Section", "Priority", "Homepage", "Installed-Size"} {
				if fields[f] == "" {
					t.Errorf("%s has no %s", deb, f)
				}
			}
			if got := contents(t, deb); !equal(got, files) {
				t.Errorf("%s holds\n%v, want\n%v", deb, got, files)
			}
			root := t.TempDir()
			output(t, "dpkg-deb", "--raw-extract", deb, root)
			checkRoot(t, name, root, version, arch)
		}
		if !archs["amd64"] || !archs["arm64"] {
			t.Errorf("%s is there for %v", name, archs)
		}
	}
}

func fields(control string) map[string]string {
	all := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^([A-Z][A-Za-z-]*): (.*)$`).FindAllStringSubmatch(control, -1) {
		all[m[1]] = m[2]
	}
	return all
}

// contents lists the files, which are root's, with their modes.
func contents(t *testing.T, deb string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(output(t, "dpkg-deb", "--contents", deb)) {
		f := strings.Fields(line)
		if f[1] != "root/root" {
			t.Errorf("%s: not root's: %s", deb, line)
		}
		if path := strings.TrimPrefix(f[len(f)-1], "."); f[0][0] != 'd' {
			all[path] = f[0]
		} else if f[0] != "drwxr-xr-x" {
			t.Errorf("%s: %s", deb, line)
		}
	}
	return all
}

func equal(a, b map[string]string) bool {
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return len(a) == len(b)
}

// checkRoot: what the unit starts is there and says its version; what dpkg must not overwrite is named; scripts are ones.
func checkRoot(t *testing.T, name, root, version, arch string) {
	t.Helper()
	units, _ := filepath.Glob(filepath.Join(root, "usr/lib/systemd/system/*.service"))
	for _, unit := range units {
		text, _ := os.ReadFile(unit)
		m := regexp.MustCompile(`(?m)^ExecStart=(\S+)`).FindSubmatch(text)
		if m == nil {
			t.Errorf("%s starts nothing", unit)
			continue
		}
		if _, err := os.Stat(filepath.Join(root, string(m[1]))); err != nil {
			t.Errorf("%s starts %s: %v", filepath.Base(unit), m[1], err)
		}
		if strings.Contains(string(text), "/usr/local") {
			t.Errorf("%s speaks of /usr/local", unit)
		}
	}
	if arch == "amd64" {
		if out := output(t, filepath.Join(root, "usr/bin", name), "version"); !strings.Contains(out, " "+version+" linux/") {
			t.Errorf("%s says %q", name, out)
		}
	}
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		output(t, "sh", "-n", filepath.Join(root, "DEBIAN", script))
	}
	conf, _ := os.ReadFile(filepath.Join(root, "DEBIAN/conffiles"))
	var want []string
	for path := range packages[name] {
		if strings.HasPrefix(path, "/etc/") {
			want = append(want, path)
		}
	}
	if !slices.Equal(strings.Fields(string(conf)), want) {
		t.Errorf("%s: conffiles %q, want %q", name, conf, want)
	}
	if sums, err := os.ReadFile(filepath.Join(root, "DEBIAN/md5sums")); err != nil || !bytes.Contains(sums, []byte("usr/bin/"+name)) {
		t.Errorf("%s has no sums: %v", name, err)
	}
}

// TestSystemTakesThem: dpkg unpacks each package into a root of its own, where its users can be made.
func TestSystemTakesThem(t *testing.T) {
	for name := range packages {
		deb := dist(t, name+"_*_amd64.deb")[0]
		root := t.TempDir()
		for _, dir := range []string{"var/lib/dpkg/info", "var/lib/dpkg/updates", "etc"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		output(t, "dpkg", "--root="+root, "--force-not-root", "--force-bad-path", "--no-triggers", "--log="+filepath.Join(root, "log"), "--unpack", deb)
		if _, err := os.Stat(filepath.Join(root, "usr/bin", name)); err != nil {
			t.Error(err)
		}
		sysusers, err := exec.LookPath("systemd-sysusers")
		if err != nil {
			continue // not every Debian runs systemd
		}
		output(t, sysusers, "--root="+root, name+".conf")
		if users, err := os.ReadFile(filepath.Join(root, "etc/passwd")); err != nil || !strings.Contains(string(users), name+":x:") {
			t.Errorf("%s: no user in %q, %v", name, users, err)
		}
	}
}

// TestExampleIsTaken: the configuration that the package brings is one, once it is filled in.
func TestExampleIsTaken(t *testing.T) {
	deb := dist(t, "culvert-coordinator_*_amd64.deb")[0]
	root := t.TempDir()
	output(t, "dpkg-deb", "--raw-extract", deb, root)
	output(t, filepath.Join(root, "usr/bin/culvert-coordinator"), "check", filepath.Join(root, "usr/share/doc/culvert-coordinator/examples/culvert.yaml"))
}

// TestCharts: each chart of the release is packed as Helm wants it, and installs the images of its own version.
func TestCharts(t *testing.T) {
	deb := filepath.Base(dist(t, "culvert-gateway_*_amd64.deb")[0])
	version := strings.Split(deb, "_")[1]
	for name := range packages {
		chart := dist(t, name+"-chart.tgz")[0]
		text := output(t, "tar", "-xzOf", chart, name+"/Chart.yaml")
		for _, want := range []string{"name: " + name, "version: " + version, `appVersion: "` + version + `"`} {
			if !strings.Contains("\n"+text, "\n"+want+"\n") {
				t.Errorf("%s lacks %q in\n%s", filepath.Base(chart), want, text)
			}
		}
		files := output(t, "tar", "-tzf", chart)
		for _, want := range []string{"values.yaml", "templates/workload.yaml", "templates/rest.yaml", "templates/_helpers.tpl"} {
			if !strings.Contains(files, name+"/"+want+"\n") {
				t.Errorf("%s lacks %s", filepath.Base(chart), want)
			}
		}
	}
}

// TestContentsAreListed: each program has a list of what it is made of, and each file of the release has its sum.
func TestContentsAreListed(t *testing.T) {
	modules, err := os.ReadFile(dist(t, "modules.txt")[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range dist(t, "*.cdx.json") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			BOMFormat  string
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal(text, &doc); err != nil || doc.BOMFormat != "CycloneDX" || len(doc.Components) < 10 {
			t.Errorf("%s: %v, %d components", file, err, len(doc.Components))
		}
		for _, c := range doc.Components {
			if c.Name != "std" && strings.Contains(file, "linux-amd64") && !bytes.Contains(modules, []byte(c.Name+" "+c.Version+"\n")) {
				t.Errorf("%s names %s %s, and modules.txt does not", filepath.Base(file), c.Name, c.Version)
			}
		}
	}
	cmd := exec.Command("sha256sum", "--check", "--quiet", "SHA256SUMS")
	cmd.Dir = os.Getenv(distEnv)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	sums, _ := os.ReadFile(filepath.Join(cmd.Dir, "SHA256SUMS"))
	for _, file := range dist(t, "*") {
		if base := filepath.Base(file); base != "SHA256SUMS" && !bytes.Contains(sums, []byte("  "+base+"\n")) {
			t.Errorf("%s has no sum", base)
		}
	}
}

// TestUnitsAreConfined: systemd's own score of what each unit leaves its program, as the operations page has it for the version that it names.
func TestUnitsAreConfined(t *testing.T) {
	if os.Getenv(distEnv) == "" {
		t.Skip("make packages runs this")
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("no systemd here")
	}
	page, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	said := regexp.MustCompile(`\(systemd (\d+)\) gives the units' exposure as ([0-9.]+) for the gateway and ([0-9.]+) for coordinator and relay`).FindStringSubmatch(string(page))
	if said == nil {
		t.Fatal("the operations page does not say how far the units are confined")
	}
	same := strings.HasPrefix(output(t, "systemd-analyze", "--version"), "systemd "+said[1]+" ")
	for unit, want := range map[string]string{"culvert-gateway": said[2], "culvert-coordinator": said[3], "culvert-relay": said[3]} {
		file, err := filepath.Abs("../systemd/" + unit + ".service")
		if err != nil {
			t.Fatal(err)
		}
		out := output(t, "systemd-analyze", "security", "--offline=true", "--threshold=20", file)
		if line := "exposure level for " + unit + ".service: " + want + " "; same && !strings.Contains(out, line) {
			t.Errorf("%s: want %s\n%s", unit, want, out[max(0, len(out)-200):])
		}
	}
}
