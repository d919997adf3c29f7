package state

import (
	"encoding/base64"
	"encoding/json"
	"slices"
	"time"
)

// encode gives a record as JSON. A lease is written by hand, as [json.Marshal] would: one is stored for each join, and its thirty claims, its
// key, times and addresses cost ten times as much by way of reflection.
func encode(r record) ([]byte, error) {
	if l, ok := r.(Lease); ok {
		return l.appendJSON(make([]byte, 0, 2048))
	}
	return json.Marshal(r)
}

func (l Lease) appendJSON(b []byte) ([]byte, error) {
	b = appendString(append(b, `{"session":`...), l.Session)
	b = appendString(append(b, `,"network":`...), l.Network)
	b = appendString(append(b, `,"key":`...), l.Key.String())
	b = appendList(append(b, `,"addresses":`...), l.Addresses, func(b []byte, i int) []byte { return appendString(b, l.Addresses[i].String()) })
	b = append(b, `,"secret_hash":`...)
	if l.SecretHash == nil {
		b = append(b, "null"...)
	} else {
		b = append(base64.StdEncoding.AppendEncode(append(b, '"'), l.SecretHash), '"')
	}
	b = appendString(append(b, `,"gateway":`...), l.Gateway)
	b = appendString(append(b, `,"gateway_name":`...), l.GatewayName)
	for _, o := range [...]struct{ name, text string }{{"standby", l.Standby}, {"standby_name", l.StandbyName}} {
		b = appendUnlessEmpty(b, o.name, o.text)
	}
	if len(l.Former) > 0 {
		b = appendList(append(b, `,"former":`...), l.Former, func(b []byte, i int) []byte { return appendString(b, l.Former[i]) })
	}
	b = appendUnlessEmpty(b, "over", l.Over)
	b = appendList(append(b, `,"rules":`...), l.Rules, func(b []byte, i int) []byte { return appendString(b, l.Rules[i]) })
	grants, err := json.Marshal(l.Grants)
	if err != nil {
		return nil, err
	}
	b = append(append(b, `,"grants":`...), grants...)
	b = appendClaimsJSON(append(b, `,"claims":`...), l.Claims)
	for _, o := range [...]struct {
		name string
		at   time.Time
	}{{"issued", l.Issued}, {"created", l.Created}, {"expires", l.Expires}, {"ends", l.Ends}, {"longest", l.Longest}} {
		b = append(append(append(b, `,"`...), o.name...), `":"`...)
		if b, err = o.at.AppendText(b); err != nil {
			return nil, err
		}
		b = append(b, '"')
	}
	return append(b, '}'), nil
}

func appendUnlessEmpty(b []byte, name, text string) []byte {
	if text == "" {
		return b
	}
	return appendString(append(append(append(b, `,"`...), name...), `":`...), text)
}

// appendList writes what one writes for each of a list.
func appendList[T any](b []byte, list []T, one func(b []byte, i int) []byte) []byte {
	if list == nil {
		return append(b, "null"...)
	}
	b = append(b, '[')
	for i := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = one(b, i)
	}
	return append(b, ']')
}

// appendClaimsJSON writes claims in the order of their names.
func appendClaimsJSON(b []byte, claims map[string]string) []byte {
	if claims == nil {
		return append(b, "null"...)
	}
	var room [64]string
	names := room[:0]
	for name := range claims {
		names = append(names, name)
	}
	slices.Sort(names)
	b = append(b, '{')
	for i, name := range names {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendString(b, name), ':')
		b = appendString(b, claims[name])
	}
	return append(b, '}')
}

// appendString writes a text in quotes.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return appendRare(b, s)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// appendRare writes a text that has more in it than plain characters.
func appendRare(b []byte, s string) []byte {
	quoted, _ := json.Marshal(s) // a text always encodes
	return append(b, quoted...)
}
