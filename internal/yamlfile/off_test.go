package yamlfile

import (
	"strings"
	"testing"
)

func TestOrOff(t *testing.T) {
	type doc struct {
		Relay OrOff[state] `yaml:"relay"`
		Next  OrOff[state] `yaml:"next"`
	}
	for text, want := range map[string]doc{
		"relay: off":                 {Relay: OrOff[state]{Off: true}},
		`relay: "off"`:               {Relay: OrOff[state]{Off: true}},
		"relay: {max: 3}":            {Relay: OrOff[state]{Value: state{Max: 3}}},
		"relay: {}":                  {},
		"relay:":                     {},
		"relay: off\nnext: {dir: a}": {Relay: OrOff[state]{Off: true}, Next: OrOff[state]{Value: state{Dir: "a"}}},
	} {
		var got doc
		if err := Decode("c.yaml", []byte(text), &got); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"relay: on":           `c.yaml:1:8: "relay" has to be a mapping, not a text`,
		"relay: {maxx: 3}":    `c.yaml:1:9: unknown key "maxx" in "relay"`,
		"relay:\n  max: lots": `c.yaml:2:8: "max" has to be a whole number`,
		"relay: {max: off}":   `c.yaml:1:14: "max" has to be a whole number`,
		"relay: [off]":        `c.yaml:1:8: "relay" has to be a mapping, not a list`,
		"relay: false":        `c.yaml:1:8: "relay" has to be a mapping, not true or false`,
	} {
		var got doc
		err := Decode("c.yaml", []byte(text), &got)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}
