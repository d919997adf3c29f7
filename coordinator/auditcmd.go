package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
)

type auditCmd struct {
	Verify auditVerifyCmd `cmd:"" help:"Find out whether anything was removed from the audit log, changed, moved or added by somebody else."`
	Tail   auditTailCmd   `cmd:"" help:"Show the audit log's records."`
	Export auditExportCmd `cmd:"" help:"Write the audit log as JSON lines that audit verify can verify anywhere."`
}

// auditSource says where a log is read.
type auditSource struct {
	Config string `placeholder:"FILE" help:"The coordinator's configuration, culvert.yaml."`
}

// open asks the running coordinator by its socket, or opens the store where none runs, or where the store is a cluster.
func (s *auditSource) open(ctx context.Context) (audit.Source, func(), error) {
	if s.Config == "" {
		return nil, nil, problem.New(problem.Usage, "the log to read is not named", "give --config FILE")
	}
	cfg, err := config.Load(s.Config)
	if err != nil {
		return nil, nil, err
	}
	if socket := cfg.Socket(); socket != "" {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
			client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			}}}
			return &audit.Remote{Client: client, URL: "http://coordinator"}, client.CloseIdleConnections, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, nil, problem.Wrap(err, problem.NeedsPrivilege, "the coordinator's socket is not this user's to open: "+socket, "run this as the coordinator's user")
		}
	}
	return openStore(ctx, cfg)
}

func openStore(ctx context.Context, cfg *config.Config) (audit.Source, func(), error) {
	c := cfg.State
	store, err := state.OpenLog(ctx, state.LogOptions{Options: state.Options{Dir: c.Dir, NATS: c.NATS, Credentials: c.Credentials}, ReadOnly: true})
	if errors.Is(err, state.ErrNotFound) {
		return nil, nil, problem.Wrap(err, problem.NotFound, "there is no audit log yet", "check state in the configuration; the log begins when the coordinator first starts")
	}
	if err != nil {
		return nil, nil, err
	}
	closeStore := func() { _ = store.Close() }
	var key ed25519.PrivateKey
	var former []ed25519.PublicKey
	err = state.Patiently(ctx, slog.Default(), func() (err error) { // a cluster that has just lost a server elects
		key, former, err = audit.Keys(ctx, store, cfg.Audit.KeyFile, cfg.Audit.FormerKeys, true)
		return err
	})
	if err != nil {
		closeStore()
		return nil, nil, err
	}
	return audit.Local{Reader: audit.NewReader(store, key, former...)}, closeStore, nil
}

func interruptible() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
}

type auditVerifyCmd struct {
	auditSource
	Export  string   `arg:"" optional:"" help:"An export to verify, - for standard input; default the log itself."`
	Key     []string `help:"The log's public key, known from elsewhere; repeat it for former ones."`
	Against string   `placeholder:"EXPORT" help:"An earlier export: the log must still hold what it ends with."`
	JSON    bool     `help:"Print the report as JSON."`
}

func (c *auditVerifyCmd) Run() error {
	ctx, stop := interruptible()
	defer stop()
	var report audit.Report
	var keys []string
	var err error
	if c.Export != "" {
		report, keys, err = c.export()
	} else {
		report, keys, err = c.log(ctx)
	}
	if err != nil {
		return err
	}
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(report)
	} else {
		printReport(os.Stdout, report, keys, len(c.Key) > 0)
	}
	if err == nil && !report.OK() {
		err = problem.New(problem.AuditBroken, fmt.Sprintf("the audit log is not what the coordinator wrote (findings: %d)", len(report.Findings)+report.More),
			"compare it with an earlier export or with the log's copy, and find out who could write to the coordinator's state")
	}
	return err
}

// log verifies the log itself. With a key that is known from elsewhere the log is exported and verified here, so that nobody
// needs to believe the coordinator.
func (c *auditVerifyCmd) log(ctx context.Context) (audit.Report, []string, error) {
	source, done, err := c.open(ctx)
	if err != nil {
		return audit.Report{}, nil, err
	}
	defer done()
	var known audit.Anchor
	if c.Against != "" {
		f, err := os.Open(c.Against)
		if err != nil {
			return audit.Report{}, nil, problem.Wrap(err, problem.Usage, "the earlier export cannot be read: "+err.Error(), "give its path")
		}
		defer f.Close()
		if known, _, err = audit.EndOf(f); err != nil {
			return audit.Report{}, nil, err
		}
	}
	report, err := source.Verify(ctx, known)
	if err != nil {
		return report, nil, err
	}
	keys, err := source.PublicKeys(ctx)
	if err != nil || len(c.Key) == 0 {
		return report, keys, err
	}
	pinned, err := audit.ParseKeys(c.Key)
	if err != nil {
		return report, nil, err
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(source.Export(ctx, url.Values{}, w)) }()
	exported, err := audit.VerifyExport(r, pinned...)
	_ = r.Close()
	report.Findings = append(report.Findings, exported.Findings...)
	return report, c.Key, err
}

// export verifies a file. Without a key the one that it names is believed, which the report says.
func (c *auditVerifyCmd) export() (audit.Report, []string, error) {
	var in io.ReadSeeker = os.Stdin
	if c.Export != "-" {
		f, err := os.Open(c.Export)
		if err != nil {
			return audit.Report{}, nil, problem.Wrap(err, problem.Usage, "the export cannot be read: "+err.Error(), "give its path")
		}
		defer f.Close()
		in = f
	}
	keys := c.Key
	if len(keys) == 0 {
		if c.Export == "-" {
			return audit.Report{}, nil, problem.New(problem.Usage, "a log from standard input needs a key to be verified with", "give --key")
		}
		_, named, err := audit.EndOf(in)
		if problem.CodeOf(err) == problem.BadRequest {
			return audit.Report{}, nil, problem.Wrap(err, problem.AuditBroken, "the export does not end with its end, which names the key: its tail was cut off, or it is none",
				"give --key to see how far it is whole; events in OCSF (--ocsf) have no chain and cannot be verified")
		}
		if err != nil {
			return audit.Report{}, nil, err
		}
		keys = []string{named}
		if _, err := in.Seek(0, io.SeekStart); err != nil {
			return audit.Report{}, nil, err
		}
	}
	parsed, err := audit.ParseKeys(keys)
	if err != nil {
		return audit.Report{}, nil, err
	}
	report, err := audit.VerifyExport(in, parsed...)
	return report, keys, err
}

func printReport(w io.Writer, r audit.Report, keys []string, pinned bool) {
	for _, f := range r.Findings {
		fmt.Fprintln(w, "found:", f.What)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "found: %d more\n", r.More)
	}
	if r.Records > 0 {
		fmt.Fprintf(w, "records %d to %d, from %s to %s, in %d signed groups\n", r.First, r.Last, r.From.Format("2006-01-02T15:04:05Z"), r.Until.Format("2006-01-02T15:04:05Z"), r.Seals)
	} else {
		fmt.Fprintln(w, "no records")
	}
	for _, k := range keys {
		fmt.Fprintln(w, "key", k)
	}
	if !pinned {
		fmt.Fprintln(w, "the key is the log's own word: give --key with one that you noted earlier, to be sure that nobody wrote all of it anew")
	}
	if r.OK() {
		fmt.Fprintln(w, "ok: nothing was removed, changed, moved or added")
	}
}

// auditFilter are the flags that choose records.
type auditFilter struct {
	Since      string   `help:"From then on: 2026-11-20T10:00:00Z, or 2h for two hours ago."`
	Until      string   `help:"Until then, likewise."`
	Event      []string `help:"Only these events, such as session.join or session.deny."`
	Repository string   `help:"Only this repository's jobs: owner/name, or owner/ for all of an owner's."`
	Run        string   `help:"Only this run_id."`
	Check      string   `help:"Only this check_run_id."`
	Session    string   `help:"Only this session."`
	Network    string   `help:"Only this network."`
	Gateway    string   `help:"Only this gateway, by name."`
	Rule       string   `help:"Only what this rule allowed, or came closest to allowing."`
	Actor      string   `help:"Only this account's runs."`
	Verdict    string   `help:"Only allowed, or only denied; of flows, records with any that is."`
}

func (f *auditFilter) query() url.Values {
	q := url.Values{}
	for name, value := range map[string]string{
		"since": f.Since, "until": f.Until, "repository": f.Repository, "run": f.Run, "check": f.Check, "session": f.Session,
		"network": f.Network, "gateway": f.Gateway, "rule": f.Rule, "actor": f.Actor, "verdict": f.Verdict,
	} {
		if value != "" {
			q.Set(name, value)
		}
	}
	q["event"] = f.Event
	return q
}

type auditTailCmd struct {
	auditSource
	auditFilter
	Last   int  `short:"n" default:"20" help:"How many of the newest that match; 0 for all."`
	Follow bool `short:"f" help:"Go on with new ones as they come."`
	JSON   bool `help:"Print records as they are, one JSON object a line."`
}

func (c *auditTailCmd) Run() error {
	ctx, stop := interruptible()
	defer stop()
	source, done, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer done()
	q := c.query()
	if c.Last > 0 {
		q.Set("last", strconv.Itoa(c.Last))
	}
	if c.Follow {
		q.Set("follow", "true")
	}
	return source.Records(ctx, q, func(line []byte) bool {
		text := string(line)
		if !c.JSON {
			text = audit.Line(line, c.Verdict)
		}
		_, err := fmt.Println(text)
		return err == nil
	})
}

type auditExportCmd struct {
	auditSource
	Since  string `help:"From then on: 2026-11-20T10:00:00Z, or 2h for two hours ago."`
	Until  string `help:"Until then, likewise."`
	Output string `short:"o" placeholder:"FILE" help:"Where to write; default standard output. The file must not exist."`
	OCSF   bool   `name:"ocsf" help:"Write events as OCSF has them, one JSON object a line and one for each flow, for tools that know it; audit verify does not."`
}

func (c *auditExportCmd) Run() (err error) {
	ctx, stop := interruptible()
	defer stop()
	source, done, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer done()
	out := os.Stdout
	if c.Output != "" {
		if out, err = os.OpenFile(c.Output, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil {
			return problem.Wrap(err, problem.Usage, "the export cannot be written: "+err.Error(), "name a file that does not exist yet")
		}
		defer func() { err = errors.Join(err, out.Close()) }()
	}
	q := (&auditFilter{Since: c.Since, Until: c.Until}).query()
	if c.OCSF {
		return exportOCSF(ctx, source, q, out)
	}
	return source.Export(ctx, q, out)
}

// exportOCSF writes records as events.
func exportOCSF(ctx context.Context, source audit.Source, q url.Values, out io.Writer) error {
	var failed error
	buffered := bufio.NewWriter(out)
	err := source.Records(ctx, q, func(line []byte) bool {
		var events [][]byte
		events, failed = audit.OCSF(line)
		for _, e := range events {
			_, werr := buffered.Write(append(e, '\n'))
			failed = errors.Join(failed, werr)
		}
		return failed == nil
	})
	return errors.Join(err, failed, buffered.Flush())
}
