package audit

import (
	"bytes"
	"crypto/ed25519"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/coordinator/state"
)

type message = state.Message

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

var publicKey = testKey.Public().(ed25519.PublicKey)

// exported gives the lines of an export of blocks with so many records each; the first record has the number first.
func exported(first uint64, blocks ...int) [][]byte {
	at := head{seq: first - 1}
	if first > 1 {
		at.hash = hashOf([]byte("before"))
	}
	var text []byte
	now := time.Unix(1_800_000_000, 0)
	for _, count := range blocks {
		from := at.seq + 1
		for range count {
			body, err := encode(joined(int(at.seq)), now)
			if err != nil {
				panic(err)
			}
			text, at = link(text, at, Join, []byte(`"n1"`), body)
		}
		text = seal(text, from, at, "n1", now, testKey)
	}
	text = append(text, end(first, at, now, testKey)...)
	return bytes.Split(bytes.TrimSuffix(text, []byte{'\n'}), []byte{'\n'})
}

func verify(lines [][]byte, keys ...ed25519.PublicKey) Report {
	if keys == nil {
		keys = []ed25519.PublicKey{publicKey}
	}
	rep, err := VerifyExport(bytes.NewReader(append(bytes.Join(lines, []byte{'\n'}), '\n')), keys...)
	if err != nil {
		panic(err)
	}
	return rep
}

func TestVerifyGoodExports(t *testing.T) {
	for name, lines := range map[string][][]byte{
		"whole": exported(1, 3, 1, 2), "after retention": exported(42, 3, 1, 2), "one record": exported(1, 1),
	} {
		if rep := verify(lines); !rep.OK() || !rep.Ended {
			t.Errorf("%s: %+v", name, rep)
		}
	}
	if rep := verify([][]byte{bytes.TrimSuffix(end(0, head{}, time.Now(), testKey), []byte{'\n'})}); !rep.OK() {
		t.Errorf("an empty export: %+v", rep)
	}
}

// TestTampering plays each of the ways to forge an export, and looks for the words that name it.
func TestTampering(t *testing.T) {
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	// lines: 0 1 2 seal3 4 seal5 6 7 seal8 end9; records 1 2 3, 4, 5 6
	for name, c := range map[string]struct {
		edit func(l [][]byte) [][]byte
		want string
	}{
		"a record removed":          {func(l [][]byte) [][]byte { return slices.Delete(l, 1, 2) }, "record 2 is missing before record 3"},
		"the first record removed":  {func(l [][]byte) [][]byte { return l[1:] }, "were signed together"},
		"two records removed":       {func(l [][]byte) [][]byte { return slices.Delete(l, 1, 3) }, "record 3 is not the one that was signed"},
		"a whole block removed":     {func(l [][]byte) [][]byte { return slices.Delete(l, 4, 6) }, "record 4 is missing before record 5"},
		"a record changed":          {change(1, "acme/shop", "acme/shap"), "record 2 is not the one that record 3 follows"},
		"a block's last one":        {change(2, "acme/shop", "acme/shap"), "record 3 is not the one that was signed"},
		"the last record changed":   {change(7, "acme/shop", "acme/shap"), "record 6 is not the one that was signed"},
		"a sequence number changed": {change(1, `"sequence":2`, `"sequence":9`), "missing"},
		"records swapped":           {swap(0, 1), "the order was changed"},
		"blocks swapped":            {func(l [][]byte) [][]byte { return slices.Concat(l[4:6], l[:4], l[6:]) }, "the order was changed"},
		"a record doubled":          {func(l [][]byte) [][]byte { return slices.Insert(l, 1, l[0]) }, "the order was changed, or it was put in"},
		"a seal removed":            {func(l [][]byte) [][]byte { return slices.Delete(l, 3, 4) }, "not the ones that were signed together"},
		"appended by hand": {func(l [][]byte) [][]byte {
			return slices.Insert(l, 9, appended(l[7]))
		}, "not signed: appended by hand"},
		"appended by hand, without an end": {func(l [][]byte) [][]byte { return append(l[:9:9], appended(l[7])) }, "not signed: appended by hand"},
		"appended and sealed with another key": {func(l [][]byte) [][]byte {
			line, at := link(nil, head{6, hashOf(l[7])}, Join, []byte(`"n1"`), []byte(`{"time":1}`))
			forged := bytes.Split(bytes.TrimSpace(seal(line, 7, at, "n1", time.Now(), other)), []byte{'\n'})
			return append(append(l[:9:9], forged...), bytes.TrimSpace(end(1, at, time.Now(), other)))
		}, "not signed by the coordinator"},
		"appended behind the end":    {func(l [][]byte) [][]byte { return append(l, appended(l[7])) }, "something follows the export's end"},
		"the tail cut off":           {func(l [][]byte) [][]byte { return l[:6] }, "its tail was cut off after record 4"},
		"the tail cut in a block":    {func(l [][]byte) [][]byte { return l[:7] }, "record 5 is not signed"},
		"the end cut off":            {func(l [][]byte) [][]byte { return l[:9] }, "its tail was cut off after record 6"},
		"the tail cut, the end kept": {func(l [][]byte) [][]byte { return slices.Delete(l, 6, 9) }, "the export ended with record 6, not with record 4"},
		"the last record changed, the end kept": {func(l [][]byte) [][]byte {
			l = slices.Delete(l, 8, 9) // its signature would tell as well
			l[7] = bytes.Replace(l[7], []byte("acme/shop"), []byte("acme/shap"), 1)
			return l
		}, "record 6 is not the one that the export ended with"},
		"the head cut, the end kept": {func(l [][]byte) [][]byte { return l[4:] }, "the export began with record 1, not with record 4"},
		"an end of another key": {func(l [][]byte) [][]byte {
			return append(l[:9:9], bytes.TrimSpace(end(1, head{6, hashOf(l[7])}, time.Now(), other)))
		}, "the export's end is not signed"},
		"a signature of another one": {func(l [][]byte) [][]byte { l[5] = l[3]; return l }, "record 3 is not the one that was signed"},
		"a signature altered":        {change(3, `"sig":"`, `"sig":"A`), "not signed by the coordinator"},
		"rubbish":                    {func(l [][]byte) [][]byte { return slices.Insert(l, 1, []byte("rubbish")) }, "not one of an audit log"},
		"a line too long":            {func(l [][]byte) [][]byte { return slices.Insert(l, 1, bytes.Repeat([]byte{'a'}, 3*MaxLine)) }, "not one of an audit log"},
		"both a record and a signature": {func(l [][]byte) [][]byte {
			return slices.Insert(l, 3, append(append([]byte{}, l[2][:len(l[2])-1]...), append([]byte(","), l[3][1:]...)...))
		}, "not one of an audit log"},
		"nothing": {func([][]byte) [][]byte { return nil }, "its tail was cut off"},
	} {
		rep := verify(c.edit(exported(1, 3, 1, 2)))
		found := slices.ContainsFunc(rep.Findings, func(f Finding) bool { return strings.Contains(f.What, c.want) })
		if rep.OK() || !found {
			t.Errorf("%s: %+v, want %q", name, rep.Findings, c.want)
		}
	}
}

func change(n int, from, to string) func([][]byte) [][]byte {
	return func(l [][]byte) [][]byte {
		changed := bytes.Replace(l[n], []byte(from), []byte(to), 1)
		if bytes.Equal(changed, l[n]) {
			panic("nothing to change")
		}
		l[n] = changed
		return l
	}
}

func swap(a, b int) func([][]byte) [][]byte {
	return func(l [][]byte) [][]byte { l[a], l[b] = l[b], l[a]; return l }
}

// appended is record 7 with a right hash of what is before it, as anybody can compute it.
func appended(last []byte) []byte {
	line, _ := link(nil, head{6, hashOf(last)}, Join, []byte(`"n1"`), []byte(`{"time":1}`))
	return bytes.TrimSpace(line)
}

// TestWrongKey: a log is only as good as the key that it is held against.
func TestWrongKey(t *testing.T) {
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32)).Public().(ed25519.PublicKey)
	if rep := verify(exported(1, 3), other); rep.OK() {
		t.Error("verified with another's key")
	}
	if rep := verify(exported(1, 3), other, publicKey); !rep.OK() {
		t.Errorf("a former key is not believed: %+v", rep.Findings)
	}
}

// TestAnyChangeIsFound changes, removes, doubles, moves or cuts something at random: it is always found.
func TestAnyChangeIsFound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blocks := rapid.SliceOfN(rapid.IntRange(1, 4), 1, 5).Draw(t, "blocks")
		lines := exported(uint64(rapid.IntRange(1, 3).Draw(t, "first")), blocks...)
		if rep := verify(lines); !rep.OK() {
			t.Fatalf("untouched: %+v", rep.Findings)
		}
		before := bytes.Join(lines, []byte{'\n'})
		i := rapid.IntRange(0, len(lines)-1).Draw(t, "line")
		switch rapid.IntRange(0, 4).Draw(t, "how") {
		case 0:
			b := bytes.Clone(lines[i])
			at := rapid.IntRange(0, len(b)-1).Draw(t, "byte")
			b[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
			lines[i] = b
		case 1:
			lines = slices.Delete(lines, i, rapid.IntRange(i+1, len(lines)).Draw(t, "to"))
		case 2:
			lines = slices.Insert(lines, rapid.IntRange(0, len(lines)).Draw(t, "at"), lines[i])
		case 3:
			j := rapid.IntRange(0, len(lines)-1).Draw(t, "other")
			lines[i], lines[j] = lines[j], lines[i]
		case 4:
			lines = lines[:i]
		}
		after := bytes.Join(lines, []byte{'\n'})
		if !bytes.Equal(before, after) && verify(lines).OK() {
			t.Fatalf("not found:\n%s\nwas:\n%s", after, before)
		}
	})
}

// TestTheStoreIsTamperedWith plays the same on what is stored.
func TestTheStoreIsTamperedWith(t *testing.T) {
	for name, f := range map[string]func(list []message) []message{
		"a block taken out": func(list []message) []message { list[2].Data = nil; return list },
		"the last one":      func(list []message) []message { list[5].Data = nil; return list },
		"the end cut off":   func(list []message) []message { return list[:4] },
		"all of it":         func([]message) []message { return nil },
		"a block changed": func(list []message) []message {
			list[2].Data = bytes.Replace(list[2].Data, []byte("acme"), []byte("evil"), 1)
			return list
		},
		"blocks swapped":        func(list []message) []message { list[1].Data, list[2].Data = list[2].Data, list[1].Data; return list },
		"a signature taken off": func(list []message) []message { list[5].Data = records(list[5].Data); return list },
	} {
		store := audittest.New()
		l := open(t, store)
		record(t, l, 0, 6)
		shut(t, l)
		sound(t, store)
		store.Tamper(f)
		if rep := verified(t, store); rep.OK() {
			t.Errorf("%s: not found", name)
		}
	}
}

func FuzzVerify(f *testing.F) {
	for _, lines := range [][][]byte{exported(1, 2, 1), exported(9, 1)} {
		f.Add(bytes.Join(lines, []byte{'\n'}))
	}
	f.Add([]byte(`{"prev":"","metadata":{"sequence":1}}` + "\n" + `{"seal":{"first":1,"last":1}}`))
	f.Add([]byte(`{"seal":{"first":18446744073709551615,"last":0}}` + "\n" + `{"end":{"first":5,"last":1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rep, err := VerifyExport(bytes.NewReader(data), publicKey)
		if err != nil {
			t.Fatal(err)
		}
		if rep.OK() && rep.Records > 0 && !bytes.Contains(data, []byte(`"end"`)) {
			t.Error("a log without a signed end is taken")
		}
		_, _ = checkBlock(data, nil, []ed25519.PublicKey{publicKey})
	})
}

// TestEndThatWasThere: a log that is sound in itself, and shorter than it is known to have been, has lost its end.
func TestEndThatWasThere(t *testing.T) {
	v := NewVerifier()
	v.anchor = Anchor{Record: 5, Hash: "known"}
	if r := v.Finish(false); r.OK() || r.Findings[0].Record != 1 {
		t.Errorf("%+v", r)
	}
}
