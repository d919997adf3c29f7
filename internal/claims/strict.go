package claims

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxDepth bounds how deep a token's claims nest; Kubernetes nests three deep.
const maxDepth = 16

// parseObject reads one JSON object so that no two readers can understand it differently: the text is UTF-8, no object in
// it has a name twice, and at the top, where Go's own decoder matches names without regard to case, no two names differ
// in case alone. The values are compact JSON.
func parseObject(data []byte) (map[string]json.RawMessage, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("the claims are not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return nil, errors.New("the claims are not a JSON object")
	}
	if err := walkObject(dec, 1); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the claims")
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		return nil, fmt.Errorf("the claims are not JSON: %w", err)
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(compact.Bytes(), &raw); err != nil {
		return nil, fmt.Errorf("the claims are not JSON: %w", err)
	}
	return raw, nil
}

// walkObject reads the rest of an object whose brace has been read.
func walkObject(dec *json.Decoder, depth int) error {
	seen := make(map[string]bool)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return fmt.Errorf("the claims are not JSON: %w", err)
		}
		name, _ := tok.(string)
		key := name
		if depth == 1 {
			key = fold(name)
		}
		if seen[key] {
			return fmt.Errorf("the claim %s stands there twice", clip(name))
		}
		seen[key] = true
		if err := walkValue(dec, depth); err != nil {
			return err
		}
	}
	return closeDelim(dec)
}

func walkArray(dec *json.Decoder, depth int) error {
	for dec.More() {
		if err := walkValue(dec, depth); err != nil {
			return err
		}
	}
	return closeDelim(dec)
}

func walkValue(dec *json.Decoder, depth int) error {
	tok, err := dec.Token()
	if err != nil {
		return fmt.Errorf("the claims are not JSON: %w", err)
	}
	if depth >= maxDepth {
		return fmt.Errorf("the claims nest deeper than %d", maxDepth)
	}
	switch tok {
	case json.Delim('{'):
		return walkObject(dec, depth+1)
	case json.Delim('['):
		return walkArray(dec, depth+1)
	}
	return nil
}

func closeDelim(dec *json.Decoder) error {
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("the claims are not JSON: %w", err)
	}
	return nil
}

// fold maps names that differ in case alone to one, over all of Unicode, as encoding/json compares names.
func fold(s string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for next := unicode.SimpleFold(r); next != r; next = unicode.SimpleFold(next) {
			least = min(least, next)
		}
		return least
	}, s)
}
