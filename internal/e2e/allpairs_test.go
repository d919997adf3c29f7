//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// matrixEnv is set by `make matrix`: try all pairs, and keep what became of them in this file. When it has all, the tables go to
// pathsPage. So they can be tried in several runs.
const (
	matrixEnv = "CULVERT_E2E_MATRIX"
	pathsPage = "../../docs/paths.md"
)

// What `make matrix` measures with.
const (
	matrixDelay = 20 * time.Millisecond // one way, on the link of each NAT, the coordinator and the issuer
	hardTries   = 10
	hardLimit   = 20 * time.Second
)

// results are what `make matrix` finds out.
type results struct {
	Pairs map[string]outcome `json:"pairs"`
	Tries map[string]tries   `json:"tries"`
}

// tries are sessions of a pair that gets its direct path by guessing ports.
type tries struct {
	Direct []time.Duration `json:"direct"` // from the start of `culvert up`, of those that were in time
	Of     int             `json:"of"`
}

// hardPairs are the pairs that have to be got through by the birthday method.
func hardPairs() []pair {
	return []pair{
		{lab.Hard, lab.Easy}, {lab.Easy, lab.Hard}, {lab.CarrierGrade, lab.Easy}, {lab.Easy, lab.CarrierGrade},
		{lab.CarrierGrade, lab.CarrierGrade},
	}
}

// TestMatrix tries all pairs one after the other, on links with delay.
func TestMatrix(t *testing.T) {
	requireMatrix(t)
	program(t, stage.ProxyProgram)
	for _, runner := range lab.Kinds() {
		for _, gateway := range lab.Kinds() {
			p := pair{runner, gateway}
			t.Run(p.String(), func(t *testing.T) {
				o := p.connect(t, lab.Link{Delay: matrixDelay}, pairTries)
				if p.check(t, o); !t.Failed() {
					record(t, func(r *results) { r.Pairs[p.String()] = o })
				}
			})
		}
	}
}

// TestMatrixHard tries ten sessions of each pair that needs the birthday method: nine of them have to be direct within 20 s. Where both
// sides guess, chance takes a few.
func TestMatrixHard(t *testing.T) {
	requireMatrix(t)
	var wait sync.WaitGroup
	for _, p := range hardPairs() {
		wait.Go(func() {
			t.Run(p.String(), func(t *testing.T) {
				got := p.tries(t)
				t.Logf("%d of %d direct, after %v", len(got.Direct), got.Of, got.Direct)
				least := 9
				if p.lucky() {
					least = 7
				}
				if len(got.Direct) < least {
					t.Fatalf("%v: only %d of %d direct within %v", p, len(got.Direct), got.Of, hardLimit)
				}
				record(t, func(r *results) { r.Tries[p.String()] = got })
			})
		})
	}
	wait.Wait()
}

func (p pair) tries(t *testing.T) tries {
	s := p.stage(t, lab.Link{Delay: matrixDelay})
	got := tries{Of: hardTries}
	for range hardTries {
		// Else a session's guesses would be let in by what the one before has sent. Of the gateway, only an easy NAT forgets: from a
		// hard one it would take seconds to notice, which is another matter.
		must(t, s.NATs[0].ForgetUDP())
		if !mapsHard(p.gateway) {
			must(t, s.NATs[1].ForgetUDP())
		}
		job := newJob(t, s, stage.JobOptions{})
		began := time.Now()
		up(t, job, "tun")
		if last, _ := waitPath(t, job, hardLimit-time.Since(began), path.direct); last.direct() {
			got.Direct = append(got.Direct, time.Since(began))
			touch(t, s)
		}
		culvert(t, job, 0, "down")
	}
	slices.Sort(got.Direct)
	return got
}

func requireMatrix(t *testing.T) {
	t.Helper()
	if os.Getenv(matrixEnv) == "" {
		t.Skip("all 81 pairs take minutes: make matrix")
	}
}

var recording sync.Mutex

// record adds to the results on file, and writes the tables when there is nothing left to find out.
func record(t *testing.T, add func(*results)) {
	t.Helper()
	recording.Lock()
	defer recording.Unlock()
	r := results{Pairs: map[string]outcome{}, Tries: map[string]tries{}}
	file := os.Getenv(matrixEnv)
	old, err := os.ReadFile(file)
	if !errors.Is(err, fs.ErrNotExist) {
		must(t, err)
		must(t, json.Unmarshal(old, &r))
	}
	add(&r)
	out, err := json.MarshalIndent(r, "", "\t")
	must(t, err)
	must(t, os.WriteFile(file, out, 0o644))
	if len(r.Pairs) < len(lab.Kinds())*len(lab.Kinds()) || len(r.Tries) < len(hardPairs()) {
		return
	}
	page, err := os.ReadFile(pathsPage)
	must(t, err)
	page, err = r.insert(page)
	must(t, err)
	must(t, os.WriteFile(pathsPage, page, 0o644))
}

// Marks around what the run writes.
const (
	tablesBegin = "<!-- make matrix writes from here -->\n"
	tablesEnd   = "<!-- to here -->\n"
)

// insert puts the tables into the page.
func (r *results) insert(page []byte) ([]byte, error) {
	before, rest, found := bytes.Cut(page, []byte(tablesBegin))
	_, after, closed := bytes.Cut(rest, []byte(tablesEnd))
	if !found || !closed {
		return nil, errors.New("the page has no marks for the tables")
	}
	return slices.Concat(before, []byte(tablesBegin), []byte(r.tables()), []byte(tablesEnd), after), nil
}

// tables writes the results as Markdown.
func (r *results) tables() string {
	open := r.Pairs[pair{lab.Open, lab.Open}.String()].FirstByte
	var b strings.Builder
	fmt.Fprintf(&b, "\nTaken on %s, %d cores that ran all programs, NATs and links of a pair, %d ms each way on every link to the internet.\n",
		time.Now().Format("2 January 2006"), runtime.NumCPU(), matrixDelay.Milliseconds())
	r.table(&b, "The path that stays:", func(o outcome) string { return o.Last })
	r.table(&b, fmt.Sprintf("Time to the first byte, median of %d joins, as a multiple of the open pair's %d ms:", pairTries, open.Milliseconds()),
		func(o outcome) string { return fmt.Sprintf("%.2f", float64(o.FirstByte)/float64(open)) })
	r.table(&b, "Seconds from the start of `culvert up` until the path is direct:", func(o outcome) string {
		if o.Last != "direct" {
			return "–"
		}
		return fmt.Sprintf("%.1f", o.Direct.Seconds())
	})
	fmt.Fprintf(&b, "\nSessions that guess ports, direct within %v:\n\n| runner | gateway | direct | seconds, median | slowest |\n|---|---|---|---|---|\n", hardLimit)
	for _, p := range hardPairs() {
		got := r.Tries[p.String()]
		fmt.Fprintf(&b, "| %v | %v | %d of %d | %.1f | %.1f |\n", p.runner, p.gateway, len(got.Direct), got.Of,
			median(got.Direct).Seconds(), slices.Max(got.Direct).Seconds())
	}
	b.WriteString("\n")
	return b.String()
}

func (r *results) table(b *strings.Builder, title string, cell func(outcome) string) {
	fmt.Fprintf(b, "\n%s\n\n| runner ↓ gateway → |", title)
	for _, k := range lab.Kinds() {
		fmt.Fprintf(b, " %v |", k)
	}
	b.WriteString("\n|---" + strings.Repeat("|---", len(lab.Kinds())) + "|\n")
	for _, runner := range lab.Kinds() {
		fmt.Fprintf(b, "| %v |", runner)
		for _, gateway := range lab.Kinds() {
			fmt.Fprintf(b, " %s |", cell(r.Pairs[pair{runner, gateway}.String()]))
		}
		b.WriteString("\n")
	}
}
