package requirements

import (
	"bytes"
	"flag"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
)

var update = flag.Bool("update", false, "write the tables into the documentation")

const document = "../../docs/network-requirements.md"

// TestDocumentation holds the tables in the documentation against the list. go test ./internal/requirements -update writes them.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	want := text
	for _, p := range []Party{Runner, Gateway, Coordinator, Relay} {
		if want, err = insert(want, string(p), Markdown(p)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range Clouds() {
		if want, err = insert(want, string(c), CloudMarkdown(c)); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(text, want) {
		return
	}
	if !*update {
		t.Fatalf("the tables of %s are not those of the list: go test ./internal/requirements -update", document)
	}
	if err := os.WriteFile(document, want, 0o644); err != nil {
		t.Fatal(err)
	}
}

// insert puts a table between its marks.
func insert(text []byte, mark, table string) ([]byte, error) {
	start, end := fmt.Appendf(nil, "<!-- %s -->\n", mark), fmt.Appendf(nil, "<!-- end of %s -->\n", mark)
	a, b := bytes.Index(text, start), bytes.Index(text, end)
	if a < 0 || b < a {
		return nil, fmt.Errorf("%s has no place for the table %s", document, mark)
	}
	return slices.Concat(text[:a], start, []byte(table), text[b:]), nil
}

func TestRowsAreWhole(t *testing.T) {
	ids := map[string]bool{}
	for _, r := range All() {
		if ids[r.ID] || !strings.HasPrefix(r.ID, string(r.Party)+"/") {
			t.Errorf("the id %q is taken, or is no name of a %s's", r.ID, r.Party)
		}
		ids[r.ID] = true
		for what, text := range map[string]string{"peer": r.Peer, "protocol": r.Protocol, "port": r.Port, "content": r.Carries, "purpose": r.Purpose, "when": r.When} {
			if text == "" || strings.ContainsAny(text, "|\n") || strings.HasSuffix(text, ".") || strings.Count(text, "`")%2 != 0 {
				t.Errorf("%s: the %s is %q", r.ID, what, text)
			}
		}
		if r.Direction != In && r.Direction != Out {
			t.Errorf("%s: direction %q", r.ID, r.Direction)
		}
		if r.Required && r.targets == nil {
			t.Errorf("%s is required, and cannot be tested", r.ID)
		}
	}
	for _, p := range []Party{Runner, Gateway, Coordinator, Relay} {
		if len(For(p)) == 0 || len(For(p)) == len(All()) {
			t.Errorf("%d rows for the %s", len(For(p)), p)
		}
	}
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

func example() Facts {
	return Facts{
		Coordinator: mustURL("https://culvert.example.com/base"), STUN: []string{":3478", ":3479", "stun.example.com:19302", "nonsense"},
		Relays: []wire.Relay{
			{Name: "own", UDP: ":3478", URL: "https://culvert.example.com/v1/relay"},
			{Name: "far", UDP: "relay.example.com:3478", URL: "https://relay.example.com:8443/v1/relay"},
			{Name: "broken", UDP: "relay", URL: "::"},
		},
		TokenURL: mustURL("https://pipelines.actions.githubusercontent.com/abc?api-version=2.0"),
		Issuers:  []string{"https://token.actions.githubusercontent.com", "https://192.0.2.1/issuer"},
		NATS:     []string{"tls://n1.example.com:4333", "nats://n2.example.com", ":"}, ACME: "https://ca.example.com/dir", Releases: true,
	}
}

func TestTargets(t *testing.T) {
	want := map[string][]string{
		"runner/coordinator":  {"api culvert.example.com:443 https://culvert.example.com/base"},
		"runner/token":        {"https pipelines.actions.githubusercontent.com:443 https://pipelines.actions.githubusercontent.com/"},
		"runner/stun":         {"stun culvert.example.com:3478 "},
		"runner/probe":        {"stun culvert.example.com:3479 ", "stun stun.example.com:19302 "},
		"runner/relay-https":  {"websocket relay.example.com:8443 https://relay.example.com:8443/v1/relay"},
		"runner/relay-udp":    {"relay-udp relay.example.com:3478 "},
		"runner/direct":       nil,
		"gateway/issuer":      {"discovery token.actions.githubusercontent.com:443 https://token.actions.githubusercontent.com", "discovery 192.0.2.1:443 https://192.0.2.1/issuer"},
		"coordinator/nats":    {"tcp n1.example.com:4333 ", "tcp n2.example.com:4222 "},
		"coordinator/acme":    {"https ca.example.com:443 https://ca.example.com/dir"},
		"coordinator/https":   {"api culvert.example.com:443 https://culvert.example.com/base"},
		"relay/https":         nil,
		"gateway/coordinator": {"api culvert.example.com:443 https://culvert.example.com/base"},
		"coordinator/filter":  nil,
		"gateway/router":      nil,
		"runner/dns":          {"dns culvert.example.com:0 ", "dns pipelines.actions.githubusercontent.com:0 ", "dns token.actions.githubusercontent.com:0 ", "dns relay.example.com:0 ", "dns n1.example.com:0 ", "dns n2.example.com:0 ", "dns ca.example.com:0 "},
		"runner/release":      {"https github.com:443 https://github.com/", "https release-assets.githubusercontent.com:443 https://release-assets.githubusercontent.com/", "https objects.githubusercontent.com:443 https://objects.githubusercontent.com/"},
		"coordinator/issuer":  {"discovery token.actions.githubusercontent.com:443 https://token.actions.githubusercontent.com", "discovery 192.0.2.1:443 https://192.0.2.1/issuer"},
		"coordinator/probe":   {"stun culvert.example.com:3479 ", "stun stun.example.com:19302 "},
		"gateway/relay-udp":   {"relay-udp relay.example.com:3478 "},
	}
	seen := map[string]bool{}
	for _, r := range All() {
		seen[r.ID] = true
		expected, listed := want[r.ID]
		if !listed {
			continue
		}
		var got []string
		for _, target := range r.Targets(example()) {
			got = append(got, fmt.Sprintf("%s %s:%d %s", target.Kind, target.Host, target.Port, target.URL))
		}
		if !slices.Equal(got, expected) {
			t.Errorf("%s: %q, want %q", r.ID, got, expected)
		}
	}
	for id := range want {
		if !seen[id] {
			t.Errorf("no row %s", id)
		}
	}
}

// Nothing is known, and nothing is made up.
func TestTargetsWithoutFacts(t *testing.T) {
	for _, r := range All() {
		if got := r.Targets(Facts{}); len(got) != 0 {
			t.Errorf("%s: %v", r.ID, got)
		}
	}
}

// A job's token endpoint has the job in its query, and that is nobody's business.
func TestTheTokenEndpointsQueryStaysOut(t *testing.T) {
	for _, r := range All() {
		for _, target := range r.Targets(example()) {
			if strings.Contains(target.URL, "api-version") || strings.Contains(target.URL, "abc") {
				t.Errorf("%s: %s", r.ID, target.URL)
			}
		}
	}
}
