package state

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

// fill sets every field below v to something that is not its zero value.
func fill(t *testing.T, v reflect.Value, n *int) {
	t.Helper()
	*n++
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(int64(1_800_000_000+*n), int64(*n)).UTC()))
		return
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{198, 18, 1, byte(*n)})))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprint("text", *n))
	case reflect.Uint64, reflect.Uint8:
		v.SetUint(uint64(*n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n) * int64(time.Second))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 2 {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(t, key, n)
			fill(t, value, n)
			v.SetMapIndex(key, value)
		}
	default:
		t.Fatalf("this test does not know how to fill a %s", v.Type())
	}
}

// filled gives a lease whose every field is filled, and what becomes of it.
func filled(t *testing.T) (l Lease, c *compact) {
	t.Helper()
	n := 0
	fill(t, reflect.ValueOf(&l).Elem(), &n)
	c, err := pack(l)
	if err != nil {
		t.Fatal(err)
	}
	return l, c
}

// What is written by hand is what [json.Marshal] writes, also of a field that is added some day.
func TestEncodedLease(t *testing.T) {
	full, _ := filled(t)
	text := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"", "a<b>&c", "\u2028", "tab\t\"quote\"", "\xff"}))
	rapid.Check(t, func(rt *rapid.T) {
		l := full
		if rapid.Bool().Draw(rt, "bare") {
			l = Lease{}
		}
		l.Session, l.Over, l.Standby = text.Draw(rt, "session"), text.Draw(rt, "over"), text.Draw(rt, "standby")
		l.Claims = rapid.MapOf(text, text).Draw(rt, "claims")
		l.Rules = rapid.SliceOf(text).Draw(rt, "rules")
		l.SecretHash = rapid.SliceOf(rapid.Byte()).Draw(rt, "hash")
		l.Expires = time.Unix(rapid.Int64Range(0, 1<<33).Draw(rt, "s"), rapid.Int64Range(0, 999_999_999).Draw(rt, "ns")).UTC()
		want, err := json.Marshal(l)
		if err != nil {
			rt.Fatal(err)
		}
		if got, err := encode(l); err != nil || string(got) != string(want) {
			rt.Fatalf("got  %s, %v\nwant %s", got, err, want)
		}
	})
}

// Every field of a lease survives, also one that is added some day.
func TestPackedLeaseLosesNothing(t *testing.T) {
	l, c := filled(t)
	got, err := c.lease()
	if err != nil || !reflect.DeepEqual(got, l) {
		t.Errorf("got  %+v\nwant %+v, %v", got, l, err)
	}
	for n := range c.rest { // what is cut off is an error, or less than there was
		cut := *c
		cut.rest = c.rest[:n]
		if got, err := cut.lease(); err == nil && reflect.DeepEqual(got, l) {
			t.Errorf("%d of %d bytes are a whole lease", n, len(c.rest))
		}
	}
	l = Lease{Session: wire.Key{7}.SessionID(), Key: wire.Key{7}}
	if c, err = pack(l); err != nil {
		t.Fatal(err)
	}
	if got, err := c.lease(); err != nil || !reflect.DeepEqual(got, l) {
		t.Errorf("got  %+v\nwant %+v, %v", got, l, err)
	}
}

func TestPackedLeaseSaysWhatItIs(t *testing.T) {
	l, c := filled(t)
	if !c.until().Equal(l.Expires) || !c.lasting().Equal(l.Longest) || c.head() != (Head{l.Network, l.Gateway, l.GatewayName, true}) {
		t.Errorf("%v %v %+v", c.until(), c.lasting(), c.head())
	}
}

func TestPackedClaims(t *testing.T) {
	text := rapid.String()
	rapid.Check(t, func(rt *rapid.T) {
		claims := rapid.MapOf(text, rapid.OneOf(text, rapid.SampledFrom([]string{"", "a", "b"}))).Draw(rt, "claims")
		got, err := unpackClaims(appendClaims(nil, claims))
		if err != nil || len(got) != len(claims) || len(claims) > 0 && !reflect.DeepEqual(got, claims) {
			rt.Fatalf("%q became %q, %v", claims, got, err)
		}
	})
	for i := range 2 * maxClaimNames { // more names than are numbered
		claims := map[string]string{fmt.Sprint("name", i): strings.Repeat("x", i)}
		if got, err := unpackClaims(appendClaims(nil, claims)); err != nil || !reflect.DeepEqual(got, claims) {
			t.Fatalf("%q became %q, %v", claims, got, err)
		}
	}
	for _, cut := range []string{"\x00", "\x00\x00", "\x00\x05abc", "\xff\x03ab", "\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"} {
		if got, err := unpackClaims([]byte(cut)); err == nil {
			t.Errorf("%q reads as %q", cut, got)
		}
	}
}

// What is counted of a gateway follows its leases through all that may become of them.
func TestMirrorCountsWhatGatewaysHold(t *testing.T) {
	m := newMirror()
	at := time.Now().Add(time.Minute)
	lease := func(gateway, over string) *compact {
		c, err := pack(Lease{Session: "s", Gateway: gateway, Over: over, Key: wire.Key{1}, Expires: at, Longest: at})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	m.begin()
	steps := []struct {
		do   func()
		a, b int
	}{
		{func() { m.wrote(leaseKind, "1", lease("", ""), 1) }, 0, 0},
		{func() { m.wrote(leaseKind, "1", lease("a", ""), 2) }, 1, 0},
		{func() { m.knows(leaseKind, "1", 2) }, 1, 0},
		{func() { m.watched(leaseKind, "2", lease("a", ""), 3) }, 2, 0},
		{func() { m.watched(leaseKind, "2", lease("b", ""), 4) }, 1, 1},
		{func() { m.watched(leaseKind, "2", lease("b", "over"), 5) }, 1, 0},
		{func() { m.wrote(leaseKind, "1", nil, 6) }, 0, 0},
		{func() { m.watched(leaseKind, "1", nil, 6) }, 0, 0},
		{func() { m.watched(leaseKind, "3", lease("a", ""), 7) }, 1, 0},
		{func() { m.begin() }, 1, 0},
		{func() { m.settle() }, 0, 0},
	}
	for i, s := range steps {
		s.do()
		if a, b := m.heldBy("a"), m.heldBy("b"); a != s.a || b != s.b {
			t.Errorf("step %d: a holds %d and b %d, want %d and %d", i, a, b, s.a, s.b)
		}
	}
}
