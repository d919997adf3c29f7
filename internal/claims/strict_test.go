package claims

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// FuzzStrictObject holds what is taken against encoding/json, and against what must never be taken.
func FuzzStrictObject(f *testing.F) {
	for _, seed := range []string{
		`{}`, `{"iss":"a","aud":["b"],"exp":1.5e9}`, ` { "a" : [ 1 , {"b":null} ] , "c" : "\u0041\"\\" } `, `{"a":1,"A":2}`, `{"a":{"b":1,"b":2}}`,
		`{"K":1,"\u212a":2}`, `{"a":"\ud800"}`, `[]`, `{"a":tru}`, `{"a":1}{}`, `{"a":` + strings.Repeat("[", 20) + strings.Repeat("]", 20) + `}`,
		`{"exp":-0,"nbf":null,"iat":"1"}`, "{\"a\":\"\x00\"}", `{"":{}}`, `{"a":-1.5E-3,"b":true,"c":false}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		hung := time.AfterFunc(10*time.Second, func() { panic("no answer in 10 s") })
		defer hung.Stop()
		c, err := Parse(data)
		if err != nil {
			if c != nil || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %v, %v", data, c, err)
			}
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(data, &want); err != nil {
			t.Fatalf("%q is taken: %v", data, err)
		}
		if len(want) != len(c.raw) {
			t.Fatalf("%q: %d claims, not %d", data, len(c.raw), len(want))
		}
		for name, raw := range want {
			got, ok := c.Get(name)
			if string(raw) == "null" {
				if ok {
					t.Fatalf("%q: %q is null and carried as %q", data, name, got)
				}
				continue
			}
			var text string
			var compact bytes.Buffer
			if json.Unmarshal(raw, &text) != nil {
				if err := json.Compact(&compact, raw); err != nil {
					t.Fatal(err)
				}
				text = compact.String()
			}
			if !ok || got != text {
				t.Fatalf("%q: %q is %q, not %q", data, name, got, text)
			}
		}
	})
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``: "not one JSON object", `null`: "not a JSON object", `"a"`: "not a JSON object", `[1]`: "not a JSON object", `{"a":1} x`: "not one JSON object",
		`{"a":1}{"b":2}`: "not one JSON object", "{\"a\":\"\xff\"}": "not UTF-8", `{"a":1,"a":2}`: "twice", `{"ref":1,"Ref":2}`: "twice",
		`{"s":1,"` + "\u017f" + `":2}`: "twice", `{"a":[{"b":1,"c":[],"b":2}]}`: "twice", `{"a":{"\u0062":1,"b":2}}`: "twice",
		`{"a":` + strings.Repeat(`{"a":`, 16) + `1` + strings.Repeat(`}`, 17): "deeper", `{"aud":{}}`: "neither a string", `{"aud":[1]}`: "neither a string",
		`{"exp":"1"}`: "no time", `{"exp":true}`: "no time", `{"iat":[]}`: "no time", `{"nbf":1e99}`: "no time",
	} {
		if c, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v, want %q", text, c, err, want)
		}
	}
	if _, err := Parse([]byte(`{"a":` + strings.Repeat(`[`, 14) + strings.Repeat(`]`, 14) + `,"b":{"a":1,"A":2}}`)); err != nil {
		t.Error(err)
	}
}

// A token is verified for every join and every renewal: what that allocates is held down. Most of it is go-oidc's.
func TestParseAllocatesLittle(t *testing.T) {
	text := []byte(`{"iss":"https://token.actions.githubusercontent.com","repository":"acme/shop","repository_id":"42","repository_owner":"acme",` +
		`"repository_owner_id":"9919","ref":"refs/heads/main","event_name":"push","run_id":"1","environment":"production","exp":1800000000}`)
	if n := testing.AllocsPerRun(100, func() { _, _ = Parse(text) }); n > 20 {
		t.Errorf("%v allocations", n)
	}
}
