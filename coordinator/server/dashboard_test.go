package server

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// described collects the names of what is registered, also of vectors that have counted nothing yet.
type described struct{ names map[string]bool }

var fqName = regexp.MustCompile(`fqName: "([^"]+)"`)

func (d *described) Register(c prometheus.Collector) error {
	descs := make(chan *prometheus.Desc)
	go func() {
		defer close(descs)
		c.Describe(descs)
	}()
	for desc := range descs {
		if m := fqName.FindStringSubmatch(desc.String()); m != nil {
			d.names[m[1]] = true
		}
	}
	return nil
}

func (d *described) MustRegister(list ...prometheus.Collector) {
	for _, c := range list {
		_ = d.Register(c) // never fails
	}
}

func (d *described) Unregister(prometheus.Collector) bool { return false }

// Every metric of the dashboard is there, and every one of ours is on the dashboard.
func TestDashboard(t *testing.T) {
	r := newRig(t, Options{})
	d := &described{map[string]bool{}}
	r.server.register(d)
	data, err := os.ReadFile("../../deploy/grafana/culvert.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Definition string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	metric := regexp.MustCompile(`\b(culvert|process|go)_[a-z_]+`)
	look := func(where, expr string) {
		for _, name := range metric.FindAllString(expr, -1) {
			base := name
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				if cut, ok := strings.CutSuffix(name, suffix); ok && d.names[cut] {
					base = cut
				}
			}
			shown[base] = true
			if !d.names[base] {
				t.Errorf("%s: there is no metric %s", where, name)
			}
		}
	}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			look(p.Title, target.Expr)
		}
	}
	for _, v := range dashboard.Templating.List {
		look("a variable", v.Definition)
	}
	for name := range d.names {
		if strings.HasPrefix(name, "culvert_") && !shown[name] {
			t.Errorf("the dashboard says nothing of %s", name)
		}
	}
	if len(shown) < 20 {
		t.Errorf("only %d metrics are shown", len(shown))
	}
}
