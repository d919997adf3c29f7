package claims

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxDepth bounds how deep a token's claims nest; Kubernetes nests three deep.
const maxDepth = 16

// value is one claim as it stands in the token.
type value struct {
	text string // a string's content; else the JSON text
	json string // the JSON text
}

func (v value) isString() bool { return v.json[0] == '"' }
func (v value) isNull() bool   { return v.json == "null" }

// parseObject reads one JSON object so that no two readers can understand it differently: the text is UTF-8, no object in
// it has a name twice, and at the top, where Go's own decoder matches names without regard to case, no two names differ
// in case alone.
//
// encoding/json says whether it is JSON at all; the walk over what it has found valid need not look for mistakes again,
// and copies nothing.
func parseObject(data []byte) (map[string]value, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("the claims are not UTF-8")
	}
	if !json.Valid(data) {
		return nil, errors.New("the claims are not one JSON object")
	}
	w := walker{text: string(data)}
	w.space()
	if w.text[w.at] != '{' {
		return nil, errors.New("the claims are not a JSON object")
	}
	const usual = 40 // claims of GitHub's tokens
	out := make(map[string]value, usual)
	var odd map[string]struct{} // names as fold gives them that stand there otherwise; the others are in out
	err := w.object(1, func(name, text string) error {
		key := fold(name)
		_, twice := out[key]
		if _, also := odd[key]; twice || also {
			return twiceThere(name)
		}
		if key != name {
			if odd == nil {
				odd = map[string]struct{}{}
			}
			odd[key] = struct{}{}
		}
		v := value{text: text, json: text}
		if v.isString() {
			var err error
			if v.text, err = unquote(text); err != nil {
				return err
			}
		}
		out[name] = v
		return nil
	})
	return out, err
}

func twiceThere(name string) error { return fmt.Errorf("the claim %s stands there twice", clip(name)) }

// walker goes through text that is known to be valid JSON.
type walker struct {
	text string
	at   int
}

func (w *walker) space() {
	for w.at < len(w.text) && strings.IndexByte(" \t\r\n", w.text[w.at]) >= 0 {
		w.at++
	}
}

// object calls member for every member of the object that begins here.
func (w *walker) object(depth int, member func(name, text string) error) error {
	w.at++ // {
	for {
		w.space()
		if w.text[w.at] == '}' {
			w.at++
			return nil
		}
		if w.text[w.at] == ',' {
			w.at++
			continue
		}
		name, err := unquote(w.str())
		if err != nil {
			return err
		}
		w.space()
		w.at++ // :
		text, err := w.value(depth)
		if err != nil {
			return err
		}
		if err := member(name, text); err != nil {
			return err
		}
	}
}

// value gives the text of the value that begins here.
func (w *walker) value(depth int) (string, error) {
	w.space()
	if depth >= maxDepth {
		return "", fmt.Errorf("the claims nest deeper than %d", maxDepth)
	}
	from := w.at
	var err error
	switch w.text[w.at] {
	case '"':
		w.str()
	case '{':
		seen := map[string]struct{}{}
		err = w.object(depth+1, func(name, _ string) error {
			if _, twice := seen[name]; twice {
				return twiceThere(name)
			}
			seen[name] = struct{}{}
			return nil
		})
	case '[':
		err = w.array(depth + 1)
	default: // a number, true, false or null
		for w.at < len(w.text) && strings.IndexByte(",]} \t\r\n", w.text[w.at]) < 0 {
			w.at++
		}
	}
	return w.text[from:w.at], err
}

func (w *walker) array(depth int) error {
	w.at++ // [
	for {
		w.space()
		switch w.text[w.at] {
		case ']':
			w.at++
			return nil
		case ',':
			w.at++
			continue
		}
		if _, err := w.value(depth); err != nil {
			return err
		}
	}
}

// str gives the text of the string that begins here, quotes included.
func (w *walker) str() string {
	from := w.at
	for w.at++; w.text[w.at] != '"'; w.at++ {
		if w.text[w.at] == '\\' {
			w.at++
		}
	}
	w.at++
	return w.text[from:w.at]
}

// unquote gives a JSON string's content.
func unquote(text string) (string, error) {
	if strings.IndexByte(text, '\\') < 0 {
		return text[1 : len(text)-1], nil
	}
	var s string
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return "", fmt.Errorf("the claims are not JSON: %w", err)
	}
	return s, nil
}

// fold maps names that differ in case alone to one, over all of Unicode, as encoding/json compares names. A name in lower
// case comes back as it is.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '_' {
			return r
		}
		least := r
		for next := unicode.SimpleFold(r); next != r; next = unicode.SimpleFold(next) {
			least = min(least, next)
		}
		if 'A' <= least && least <= 'Z' {
			return least + 'a' - 'A'
		}
		return least
	}, s)
}
