package state

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"sync"
	"time"
	"unique"
)

// compact is a [Lease] as the mirror keeps it. A million of them have to fit into a node's memory, so what many sessions have
// in common is there once, and claims are kept without their names.
type compact struct {
	network, gateway, gatewayName, over unique.Handle[string]
	grants                              unique.Handle[string] // Rules and Grants, as JSON
	expires, longest                    int64                 // Unix nanoseconds
	revision                            uint64
	claims                              string // see packClaims
	rest                                string // everything else, as JSON
}

// shared is what sessions of the same rules have in common.
type shared struct {
	Rules  json.RawMessage
	Grants json.RawMessage
}

func (c *compact) until() time.Time   { return time.Unix(0, c.expires) }
func (c *compact) lasting() time.Time { return time.Unix(0, c.longest) }

// pack shrinks a lease. What it cannot encode is no lease that was ever stored.
func pack(l Lease) (*compact, error) {
	rules, err := json.Marshal(l.Rules)
	if err != nil {
		return nil, fmt.Errorf("pack a lease's rules: %w", err)
	}
	grants, err := json.Marshal(l.Grants)
	if err != nil {
		return nil, fmt.Errorf("pack a lease's grants: %w", err)
	}
	both, err := json.Marshal(shared{rules, grants})
	if err != nil {
		return nil, fmt.Errorf("pack a lease's grants: %w", err)
	}
	c := &compact{
		network: unique.Make(l.Network), gateway: unique.Make(l.Gateway), gatewayName: unique.Make(l.GatewayName), over: unique.Make(l.Over),
		grants: unique.Make(string(both)), expires: l.Expires.UnixNano(), longest: l.Longest.UnixNano(), revision: l.Revision, claims: packClaims(l.Claims),
	}
	l.Network, l.Gateway, l.GatewayName, l.Over, l.Rules, l.Grants, l.Claims = "", "", "", "", nil, nil, nil
	rest, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("pack a lease: %w", err)
	}
	c.rest = string(rest)
	return c, nil
}

// lease gives the lease back; it shares nothing with c.
func (c *compact) lease() (l Lease, err error) {
	if err := json.Unmarshal([]byte(c.rest), &l); err != nil {
		return l, fmt.Errorf("unpack a lease: %w", err)
	}
	var s shared
	if err := json.Unmarshal([]byte(c.grants.Value()), &s); err != nil {
		return l, fmt.Errorf("unpack a lease's grants: %w", err)
	}
	if err := json.Unmarshal(s.Rules, &l.Rules); err != nil {
		return l, fmt.Errorf("unpack a lease's rules: %w", err)
	}
	if err := json.Unmarshal(s.Grants, &l.Grants); err != nil {
		return l, fmt.Errorf("unpack a lease's grants: %w", err)
	}
	l.Network, l.Gateway, l.GatewayName, l.Over = c.network.Value(), c.gateway.Value(), c.gatewayName.Value(), c.over.Value()
	l.Revision = c.revision
	l.Claims, err = unpackClaims(c.claims)
	return l, err
}

// head is what can be told of a packed lease at once.
func (c *compact) head() Head {
	return Head{Network: c.network.Value(), Gateway: c.gateway.Value(), GatewayName: c.gatewayName.Value(), Over: c.over.Value() != ""}
}

// claimNames numbers the names of claims, the same for all leases of this process. The table is bounded; what finds no room is
// written out.
var claimNames struct {
	sync.RWMutex
	number map[string]byte
	name   []string
}

const maxClaimNames = 255 // number 255 says that the name follows

func claimNumber(name string) byte {
	t := &claimNames
	t.RLock()
	n, ok := t.number[name]
	t.RUnlock()
	if ok {
		return n
	}
	t.Lock()
	defer t.Unlock()
	if n, ok = t.number[name]; ok {
		return n
	}
	if len(t.name) >= maxClaimNames {
		return maxClaimNames
	}
	if t.number == nil {
		t.number = map[string]byte{}
	}
	n = byte(len(t.name)) //nolint:gosec // below maxClaimNames
	t.number[name], t.name = n, append(t.name, name)
	return n
}

func claimName(n byte) (string, bool) {
	t := &claimNames
	t.RLock()
	defer t.RUnlock()
	if int(n) >= len(t.name) {
		return "", false
	}
	return t.name[n], true
}

// packClaims writes claims one after the other: the name's number, or 255 and the name, then the value. A text is its length
// (a varint) and its bytes.
func packClaims(claims map[string]string) string {
	size := 0
	for _, v := range claims {
		size += len(v) + 3
	}
	b := make([]byte, 0, size)
	for name, v := range claims {
		n := claimNumber(name)
		b = append(b, n)
		if n == maxClaimNames {
			b = appendText(b, name)
		}
		b = appendText(b, v)
	}
	return string(b)
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func unpackClaims(s string) (map[string]string, error) {
	if s == "" {
		return nil, nil
	}
	out := make(map[string]string, 32)
	for b := []byte(s); len(b) > 0; {
		n := b[0]
		b = b[1:]
		name, ok := claimName(n)
		if n == maxClaimNames {
			name, b, ok = cutText(b)
		}
		v, rest, whole := cutText(b)
		if !ok || !whole {
			return nil, fmt.Errorf("unpack a lease's claims: they are cut off")
		}
		out[name], b = v, rest
	}
	return out, nil
}

func cutText(b []byte) (s string, rest []byte, ok bool) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(len(b)-used) { //nolint:gosec // not negative
		return "", nil, false
	}
	end := used + int(n) //nolint:gosec // at most len(b)
	return string(b[used:end]), b[end:], true
}
