package state

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"
	"unique"

	"github.com/culvertnet/culvert/internal/wire"
)

// compact is a [Lease] as the mirror keeps it. A million of them have to fit into a node's memory, and the garbage collector has to
// look at each pointer in them: what many sessions have in common is there once, and all else is in one text.
type compact struct {
	network, gateway, gatewayName, over unique.Handle[string]
	grants                              unique.Handle[string] // Rules and Grants, as JSON
	expires, longest                    int64                 // see nanos
	revision                            uint64
	rest                                string // see pack
}

// shared is what sessions of the same rules have in common.
type shared struct {
	Rules  []string
	Grants []wire.Grant
}

func (c *compact) until() time.Time   { return fromNanos(c.expires) }
func (c *compact) lasting() time.Time { return fromNanos(c.longest) }

// nanos is a time as Unix nanoseconds; the zero time, which has none, as the least of all.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return math.MinInt64
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == math.MinInt64 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// pack shrinks a lease. What it cannot encode is no lease that was ever stored.
//
// The rest is texts, each its length (a varint) and its bytes: key, session (empty where it is the key's), secret hash, standby, its name,
// the former gateways and the addresses, each behind their number; then three times of 8 bytes, and the claims, see packClaims.
func pack(l Lease) (*compact, error) {
	both, err := json.Marshal(shared{l.Rules, l.Grants})
	if err != nil {
		return nil, fmt.Errorf("pack a lease's grants: %w", err)
	}
	session := l.Session
	if session == l.Key.SessionID() {
		session = ""
	}
	b := make([]byte, 0, 1024)
	for _, text := range []string{string(l.Key[:]), session, string(l.SecretHash), l.Standby, l.StandbyName} {
		b = appendText(b, text)
	}
	b = binary.AppendUvarint(b, uint64(len(l.Former)))
	for _, f := range l.Former {
		b = appendText(b, f)
	}
	b = binary.AppendUvarint(b, uint64(len(l.Addresses)))
	for _, a := range l.Addresses {
		b = appendText(b, string(a.AsSlice()))
	}
	for _, t := range []time.Time{l.Issued, l.Created, l.Ends} {
		b = binary.BigEndian.AppendUint64(b, uint64(nanos(t))) //nolint:gosec // back by the same way
	}
	return &compact{
		network: unique.Make(l.Network), gateway: unique.Make(l.Gateway), gatewayName: unique.Make(l.GatewayName), over: unique.Make(l.Over),
		grants: unique.Make(string(both)), expires: nanos(l.Expires), longest: nanos(l.Longest), revision: l.Revision, rest: string(appendClaims(b, l.Claims)),
	}, nil
}

// lease gives the lease back; it shares nothing with c.
func (c *compact) lease() (l Lease, err error) {
	var s shared
	if err := json.Unmarshal([]byte(c.grants.Value()), &s); err != nil {
		return l, fmt.Errorf("unpack a lease's grants: %w", err)
	}
	r := reader{b: []byte(c.rest)}
	key := r.text()
	l = Lease{
		Session: r.text(), SecretHash: []byte(r.text()), Standby: r.text(), StandbyName: r.text(), Rules: s.Rules, Grants: s.Grants,
		Network: c.network.Value(), Gateway: c.gateway.Value(), GatewayName: c.gatewayName.Value(), Over: c.over.Value(),
		Expires: fromNanos(c.expires), Longest: fromNanos(c.longest), Revision: c.revision,
	}
	copy(l.Key[:], key)
	if l.Session == "" {
		l.Session = l.Key.SessionID()
	}
	if len(l.SecretHash) == 0 {
		l.SecretHash = nil
	}
	for range r.number() {
		l.Former = append(l.Former, r.text())
	}
	for range r.number() {
		a, _ := netip.AddrFromSlice([]byte(r.text()))
		l.Addresses = append(l.Addresses, a)
	}
	l.Issued, l.Created, l.Ends = r.time(), r.time(), r.time()
	if r.short {
		return l, errCut
	}
	l.Claims, err = unpackClaims(r.b)
	return l, err
}

// errCut says that a packed lease is not whole.
var errCut = errors.New("unpack a lease: it is cut off")

// reader takes a packed lease apart.
type reader struct {
	b     []byte
	short bool // there was less than was asked for
}

// number reads a varint that is no more than the bytes that are left.
func (r *reader) number() uint64 {
	n, used := binary.Uvarint(r.b)
	if used <= 0 || n > uint64(len(r.b)-used) { //nolint:gosec // not negative
		r.b, r.short = nil, true
		return 0
	}
	r.b = r.b[used:]
	return n
}

func (r *reader) text() string {
	n := r.number()
	text := string(r.b[:n])
	r.b = r.b[n:]
	return text
}

// spot is the lease's IPv4 address, without unpacking the rest.
func (c *compact) spot() (spot, bool) {
	rest := c.rest
	skip := func() string {
		n, used := uvarint(rest)
		text := rest[used : used+int(n)] //nolint:gosec // as pack wrote it
		rest = rest[used+int(n):]        //nolint:gosec // as above
		return text
	}
	number := func() int {
		n, used := uvarint(rest)
		rest = rest[used:]
		return int(n) //nolint:gosec // as above
	}
	for range 5 {
		skip()
	}
	for range number() {
		skip()
	}
	if number() == 0 {
		return spot{}, false
	}
	addr := skip()
	if len(addr) != 4 {
		return spot{}, false
	}
	return spot{c.network, [4]byte([]byte(addr))}, true
}

// uvarint is [binary.Uvarint] for a text.
func uvarint(text string) (n uint64, used int) {
	for shift := 0; ; shift += 7 {
		b := text[used]
		used++
		if n |= uint64(b&0x7f) << shift; b < 0x80 {
			return n, used
		}
	}
}

func (r *reader) time() time.Time {
	if len(r.b) < 8 {
		r.b, r.short = nil, true
		return time.Time{}
	}
	n := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return fromNanos(int64(n)) //nolint:gosec // see pack
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

// appendClaims writes claims one after the other, in the order of their names: the name's number, or 255 and the name, then the value. Several
// claims of a job often have the same value: from the second time on that is an empty text and the number of the claim that has it, counted from 0,
// or 255 where the value is empty.
func appendClaims(b []byte, claims map[string]string) []byte {
	var room [64]string
	names := room[:0]
	for name := range claims {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		n := claimNumber(name)
		b = append(b, n)
		if n == maxClaimNames {
			b = appendText(b, name)
		}
		v := claims[name]
		like := slices.IndexFunc(names[:min(i, maxClaimNames)], func(o string) bool { return claims[o] == v })
		switch {
		case v == "":
			b = append(b, 0, maxClaimNames)
		case like >= 0:
			b = append(b, 0, byte(like)) //nolint:gosec // below maxClaimNames
		default:
			b = appendText(b, v)
		}
	}
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func unpackClaims(b []byte) (map[string]string, error) {
	if len(b) == 0 {
		return nil, nil
	}
	out := make(map[string]string, 32)
	var values []string
	for r := (reader{b: b}); len(r.b) > 0; {
		name, ok := claimName(r.byte())
		if !ok {
			name = r.text()
		}
		v := r.text()
		if v == "" {
			if like := int(r.byte()); like < len(values) {
				v = values[like]
			}
		}
		if r.short {
			return nil, errCut
		}
		out[name], values = v, append(values, v)
	}
	return out, nil
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.short = true
		return 0
	}
	n := r.b[0]
	r.b = r.b[1:]
	return n
}
