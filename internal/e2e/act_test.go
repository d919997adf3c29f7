//go:build linux

package e2e

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// Where what plays GitHub's runner is: act, and the folder of the Node that actions get. The Makefile fetches both.
const (
	actEnv  = "CULVERT_TEST_ACT"
	nodeEnv = "CULVERT_TEST_NODE"
)

// actionVersion is the release that the tests' copies of the action belong to.
const actionVersion = "1.2.3"

// platform is how releases name this machine's client.
const platform = runtime.GOOS + "-" + runtime.GOARCH

// actions is a stage with what workflows need: act and Node 24, PostgreSQL as db.internal, and a release of the client where the
// action looks for it.
type actions struct {
	*stage.Stage
	act, node string
	release   *lab.Host
	action    string // the action as a release has it
	forged    string // the same, but what is served has another digest
}

// actionRules grants db.internal and the service's HTTP port to pushes to main, and in the other network, which not every stage has, wiki.lab.
func actionRules(s *stage.Stage) string {
	other := ""
	if s.HasOther() {
		other = fmt.Sprintf("- {name: other, network: %s, match: {repository_owner_id: %q}, allow: [\"tcp %s:80\"]}\n", otherNetwork, stage.OwnerID, otherName)
	}
	return other + fmt.Sprintf("- name: deploy\n  network: %s\n  match: {repository_owner_id: %q, repository: %s, ref: refs/heads/main}\n"+
		"  allow: [\"tcp db.internal:5432\", \"tcp %s\"]\n", stage.Network, stage.OwnerID, stage.Repository, s.Target(stage.PortHTTP))
}

func newActions(t testing.TB, opts stage.Options) *actions {
	t.Helper()
	a := &actions{act: tool(t, actEnv, "act"), node: filepath.Dir(tool(t, nodeEnv, "node"))}
	postgres := newPostgres(t)
	opts.Names = []string{firstName, otherName}
	if opts.Rules == nil {
		opts.Rules = actionRules
	}
	downloads, err := scratch("culvert-downloads-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(downloads) })
	opts.Coordinator += fmt.Sprintf("\ndownloads: %q\n", downloads)
	a.Stage = scenery(t, opts)
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { postgres.start(t, a.Private) })
	must(t, a.Start(timeout(t, time.Minute)))
	a.publish(t, downloads)
	return a
}

// tool finds a program by the variable that the Makefile sets; without it the test is skipped, and fails where CI=true.
func tool(t testing.TB, env, name string) string {
	t.Helper()
	if path := os.Getenv(env); path != "" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing (%s=%q), and CI must not skip", name, env, os.Getenv(env))
	}
	t.Skipf("%s is missing; make test fetches it and sets %s", name, env)
	return ""
}

// publish serves the client as a release does, leaves it with the coordinator as well, and makes copies of the action that belong to it.
func (a *actions) publish(t testing.TB, downloads string) {
	t.Helper()
	client, err := os.ReadFile(a.Binary("culvert"))
	must(t, err)
	var packed bytes.Buffer
	w, _ := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	_, err = w.Write(client)
	must(t, err)
	must(t, w.Close())
	folder := filepath.Join(downloads, "v"+actionVersion)
	must(t, os.Mkdir(folder, 0o755))
	must(t, os.WriteFile(filepath.Join(folder, "culvert-"+platform+".gz"), packed.Bytes(), 0o644))
	a.release, err = a.Net.Host("release", lab.HostOptions{})
	must(t, err)
	asset := fmt.Sprintf("/culvertnet/culvert/releases/download/v%s/culvert-%s.gz", actionVersion, platform)
	must(t, a.Serve(a.release, 443, a.Authority(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != stage.ReleaseHost || r.URL.Path != asset {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(packed.Bytes())
	})))
	sum := sha256.Sum256(client)
	a.action = copyAction(t, hex.EncodeToString(sum[:]))
	a.forged = copyAction(t, strings.Repeat("ab", sha256.Size))
}

// copyAction makes a copy of the action that pins this digest, as the release process does.
func copyAction(t testing.TB, digest string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.CopyFS(filepath.Join(dir, "action"), os.DirFS("../../action")))
	must(t, os.RemoveAll(filepath.Join(dir, "action", "test")))
	definition, err := os.ReadFile("../../action.yml")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "action.yml"), definition, 0o644))
	release := fmt.Sprintf(`{"version": %q, "sha256": {%q: %q}}`, actionVersion, platform, digest)
	must(t, os.WriteFile(filepath.Join(dir, "action", "release.json"), []byte(release), 0o644))
	return dir
}

// machine is a runner with a network of its own.
type machine struct {
	*actions
	job  *stage.Job
	home string // everything that a run may write to
	user bool   // steps run as an ordinary user who may use sudo, see asUser
	etc  string // where the files are that make it so
}

// machine makes a runner behind the runners' NAT, or another one. Its own names are in a hosts file, its DNS server does not answer.
func (a *actions) machine(t testing.TB, name string, nat *lab.NAT, claims map[string]any) *machine {
	t.Helper()
	if nat == nil {
		nat = a.NATs[0]
	}
	host, err := a.Net.Host(name, lab.HostOptions{Behind: nat})
	must(t, err)
	m := &machine{actions: a, job: newJob(t, a.Stage, stage.JobOptions{Host: host, Claims: claims})}
	m.home = m.job.Home()
	for _, dir := range []string{"tmp", "work/.github/workflows"} {
		must(t, os.MkdirAll(filepath.Join(m.home, dir), 0o755))
	}
	for file, text := range map[string]string{
		"hosts":       fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", a.release.Addr(), stage.ReleaseHost),
		"resolv.conf": fmt.Sprintf("nameserver %s\noptions timeout:1 attempts:1\n", a.IssuerHost.Addr()),
	} {
		must(t, os.WriteFile(filepath.Join(m.home, file), []byte(text), 0o644))
	}
	return m
}

// actRun is a workflow that runs.
type actRun struct {
	m    *machine
	proc *lab.Process
	log  string
}

// begin starts act on a workflow. It gets a mount namespace of its own, so that the machine's hosts and resolv.conf are the runner's.
func (m *machine) begin(t testing.TB, yaml, action string, env ...string) *actRun {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(m.home, "work/.github/workflows/w.yml"), []byte(yaml), 0o644))
	steps := slices.Concat(m.job.Environ(), []string{"NODE_EXTRA_CA_CERTS=" + m.CAFile(), "PGUSER=postgres", "PAGER=cat", "PGCONNECT_TIMEOUT=20"}, env)
	args := append(m.enter(), m.act, "push", "-P", "ubuntu-latest=-self-hosted", "--no-cache-server", "--concurrent-jobs", "32",
		"--local-repository", "culvertnet/culvert@v1="+action)
	var file strings.Builder // what act gives to steps
	for _, entry := range steps {
		if name, value, _ := strings.Cut(entry, "="); name != "PATH" && name != "HOME" && name != "TMPDIR" {
			fmt.Fprintf(&file, "%s='%s'\n", name, value)
		}
	}
	must(t, os.WriteFile(m.file("work/.env"), []byte(file.String()), 0o600))
	if m.user {
		m.give(t)
	}
	log, err := os.Create(m.file("act.log"))
	must(t, err)
	defer log.Close()
	own := []string{"PATH=" + m.node + ":" + os.Getenv("PATH"), "HOME=" + m.home, "TMPDIR=" + m.file("tmp")}
	proc, err := m.job.Host().Start(lab.Program{Path: program(t, "unshare"), Args: args, Env: own, Stdout: log, Stderr: log})
	must(t, err)
	return &actRun{m: m, proc: proc, log: log.Name()}
}

// enter gives the arguments of unshare that make the machine's files its own.
func (m *machine) enter() []string {
	const binds = `mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && `
	args := []string{"--mount", "sh", "-c", binds + `cd "$3" && shift 3 && exec "$@"`, "sh", m.file("hosts"), m.file("resolv.conf"), m.file("work")}
	if m.user {
		args[3] = binds + `for f in passwd sudoers; do mount --bind "$4/$f" "/etc/$f" || exit; done; cd "$3" && shift 4 && exec "$@"`
		id := strconv.Itoa(lab.UnprivilegedID)
		args = append(args, m.etc, "setpriv", "--reuid="+id, "--regid="+id, "--clear-groups")
	}
	return args
}

func (m *machine) file(name string) string { return filepath.Join(m.home, name) }

func (r *actRun) output(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(r.log)
	must(t, err)
	return string(text)
}

// end waits for the workflow and gives act's exit code and output.
func (r *actRun) end(t testing.TB) (int, string) {
	t.Helper()
	code, err := r.proc.Wait(timeout(t, 2*time.Minute))
	if err != nil {
		t.Fatalf("%v\n%s", err, r.output(t))
	}
	return code, r.output(t)
}

// summary is what the job's summary says.
func (m *machine) summary(t testing.TB) string {
	t.Helper()
	files, err := filepath.Glob(m.file(".cache/act/*/act/workflow/SUMMARY.md"))
	must(t, err)
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		must(t, err)
		all.Write(text)
	}
	return all.String()
}

// state is everything of the runner that a job might leave changed: network, processes, files.
func (m *machine) state(t testing.TB) []string {
	t.Helper()
	// The kernel gives a new interface its link-local address when it is so far; a tunnel has none.
	lines := slices.DeleteFunc(snapshot(t, m.job.Host()), func(line string) bool { return strings.Contains(line, "fe80::") })
	lines = append(lines, m.job.Host().Processes()...)
	err := filepath.WalkDir(m.home, func(path string, entry os.DirEntry, err error) error {
		switch rel, _ := filepath.Rel(m.home, path); {
		case err != nil:
			return err
		case rel == ".cache" || rel == ".config" || rel == "work" || rel == "act.log": // act's own
			if entry.IsDir() {
				return filepath.SkipDir
			}
			return nil
		case entry.Type().IsRegular():
			data, err := os.ReadFile(path)
			lines = append(lines, fmt.Sprintf("file %s %x", rel, sha256.Sum256(data)))
			return err
		default:
			lines = append(lines, "file "+rel+" "+entry.Type().String())
		}
		return nil
	})
	must(t, err)
	return lines
}

// clean waits until the runner is as it was: what has been told to end may need a moment.
func (m *machine) clean(t testing.TB, before []string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		diff := cmp.Diff(before, m.state(t))
		if diff == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the runner is not as it was (-before +after):\n%s", diff)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// postgres is Debian's PostgreSQL with a data folder of its own.
type postgres struct {
	bin, dir string
	as       []string // the command that makes it run as an ordinary user, which it insists on
}

func newPostgres(t testing.TB) *postgres {
	t.Helper()
	program(t, "psql")
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(found) == 0 {
		program(t, "postgres") // says what is missing
	}
	dir, err := scratch("culvert-db-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	const nobody = 65534
	p := &postgres{bin: found[len(found)-1], dir: dir, as: []string{"setpriv", "--pdeathsig=KILL", "--reuid=nobody", "--regid=nogroup", "--clear-groups"}}
	if os.Chown(dir, nobody, nobody) != nil { // there is one user only, inside lab.Enter
		p.as = []string{"unshare", "--user", "--map-user=65534", "--map-group=65534"}
	}
	return p
}

// start makes a database and serves it on the host, to everybody.
func (p *postgres) start(t testing.TB, host *lab.Host) {
	data := filepath.Join(p.dir, "data")
	make := append(slices.Clone(p.as), p.bin+"/initdb", "--no-sync", "--auth=trust", "--username=postgres", "--no-locale", "--encoding=UTF8", data)
	if out, err := exec.Command(make[0], make[1:]...).CombinedOutput(); err != nil {
		t.Errorf("make a database: %v\n%s", err, out)
		return
	}
	access, err := os.OpenFile(filepath.Join(data, "pg_hba.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = access.WriteString("host all all all trust\n")
		access.Close()
	}
	if err != nil {
		t.Errorf("let everybody in: %v", err)
		return
	}
	serve := append(slices.Clone(p.as), p.bin+"/postgres", "-D", data, "-c", "listen_addresses="+host.Addr().String(),
		"-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=8MB")
	path, err := exec.LookPath(serve[0])
	if err == nil {
		_, err = host.Start(lab.Program{Path: path, Args: serve[1:]})
	}
	if err != nil {
		t.Errorf("start PostgreSQL: %v", err)
	}
}
