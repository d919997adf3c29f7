package snippets

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

func TestFind(t *testing.T) {
	dir := t.TempDir()
	page := "# x\n\n```yaml\nsteps:\n  - uses: culvertnet/culvert@v1\n\n  - run: x\n```\n\n```yaml\nrules: []\n```\n\n```yaml workflow\njobs:\n  a: {steps: [{uses: culvertnet/culvert@v1}]}\n```\n```yaml\n- uses: culvertnet/culvert@v1\n```\n"
	if err := os.WriteFile(filepath.Join(dir, "README.md"), []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	all, err := Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []Workflow{
		{"README.md", 4, "on: push\njobs:\n  example:\n    runs-on: ubuntu-latest\n    steps:\n      - uses: culvertnet/culvert@v1\n\n      - run: x\n"},
		{"README.md", 15, "on: push\njobs:\n  a: {steps: [{uses: culvertnet/culvert@v1}]}\n"},
		{"README.md", 19, "on: push\njobs:\n  example:\n    runs-on: ubuntu-latest\n    permissions: {id-token: write, contents: read}\n    steps:\n      - uses: culvertnet/culvert@v1\n"},
	}
	if !slices.Equal(all, want) {
		t.Errorf("found %+v", all)
	}
	if _, err := Find(filepath.Join(dir, "missing")); err == nil {
		t.Error("no README and no complaint")
	}
}

// Every workflow in the documentation, and of this repository, is one that GitHub takes, with inputs that the action has. actionlint knows an action's inputs
// only where the action is in the repository itself, so it gets a copy that says ./culvert.
func TestActionlint(t *testing.T) {
	program := os.Getenv("CULVERT_TEST_ACTIONLINT")
	if _, err := os.Stat(program); err != nil {
		if program, err = exec.LookPath("actionlint"); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal("actionlint is missing, and CI must not skip")
			}
			t.Skip("actionlint is missing; make check fetches it")
		}
	}
	all, err := Find(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("the documentation shows no workflow")
	}
	own, err := filepath.Glob(filepath.Join(root, ".github", "workflows", "*.yml"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	definition, err := os.ReadFile(filepath.Join(root, "action.yml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{".git", ".github/workflows", "culvert/action"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("culvert/action.yml", definition)
	for _, name := range []string{"main.mjs", "post.mjs"} {
		write("culvert/action/"+name, nil)
	}
	lint := func(text string) (string, error) {
		local := strings.ReplaceAll(text, "culvertnet/culvert@v1", "./culvert")
		cmd := exec.Command(program, "-shellcheck=", "-pyflakes=", write(".github/workflows/w.yml", []byte(local)))
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, w := range all {
		if out, err := lint(w.Text); err != nil {
			t.Errorf("%s: %v\n%s\n%s", w.Name(), err, out, w.Text)
		}
	}
	for _, file := range own {
		if text, err := os.ReadFile(file); err != nil {
			t.Error(err)
		} else if out, err := lint(string(text)); err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
	if out, err := lint(strings.Replace(all[0].Text, "coordinator:", "cordinator:", 1)); err == nil {
		t.Errorf("actionlint takes an input that the action does not have: %s", out)
	}
}

// Our own workflows trust nothing that can be moved, and begin with no permission at all.
func TestWorkflowsTrustNothingThatMoves(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, ".github", "workflows", "*.yml"))
	if err != nil || len(files) < 2 {
		t.Fatalf("%d workflows, %v", len(files), err)
	}
	pinned := regexp.MustCompile(`^[a-z-]+/[a-z-]+@[0-9a-f]{40} # v[0-9]+\.[0-9]+\.[0-9]+$`)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\npermissions: {}\n") {
			t.Errorf("%s gives its jobs permissions by default", file)
		}
		for _, m := range regexp.MustCompile(`(?m)^ *(?:- )?uses: (.*)$`).FindAllStringSubmatch(string(text), -1) {
			if !pinned.MatchString(m[1]) {
				t.Errorf("%s uses %q, which is no commit with its version beside it", file, m[1])
			}
		}
	}
}
