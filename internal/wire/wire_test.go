package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestKeyText(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		raw := rapid.SliceOfN(rapid.Byte(), KeySize, KeySize).Draw(rt, "key")
		key := Key(raw)
		if key.IsZero() {
			return
		}
		for _, text := range []string{key.String(), base64.StdEncoding.EncodeToString(raw), base64.URLEncoding.EncodeToString(raw)} {
			if got, err := ParseKey(text); err != nil || got != key {
				rt.Fatalf("%q reads as %v, %v", text, got, err)
			}
		}
		data, err := json.Marshal(key)
		var back Key
		if err != nil || json.Unmarshal(data, &back) != nil || back != key {
			rt.Fatalf("does not survive JSON: %s, %v", data, err)
		}
	})
}

func TestParseKeyRefuses(t *testing.T) {
	valid := Key{1, 2, 3}.String()
	for name, text := range map[string]string{
		"nothing":            "",
		"too short":          valid[:42],
		"too long":           valid + "AA",
		"not base64":         strings.Repeat("!", 43),
		"the zero key":       Key{}.String(),
		"stray trailing bit": valid[:42] + "B",
		"hexadecimal":        Key{1, 2, 3}.Hex(),
	} {
		if key, err := ParseKey(text); err == nil {
			t.Errorf("%s: %q reads as %v", name, text, key)
		}
	}
}

func TestSessionIDIsTheKeys(t *testing.T) {
	// SHA-256 of 32 bytes of 0x01, first 16 bytes, base64url.
	key := Key(bytes.Repeat([]byte{1}, KeySize))
	if got, want := key.SessionID(), "cs1uhCLEB_ttCYaQ8RMLfQ"; got != want {
		t.Errorf("session id %q, want %q", got, want)
	}
	if (Key{1}).SessionID() == (Key{2}).SessionID() {
		t.Error("two keys, one session")
	}
}

func TestAudienceBindsCoordinatorAndKey(t *testing.T) {
	key := Key{7}
	want := "https://culvert.example.com/wg/" + key.String()
	for _, url := range []string{"https://culvert.example.com", "https://culvert.example.com/"} {
		if got := Audience(url, key); got != want {
			t.Errorf("%s: audience %q, want %q", url, got, want)
		}
	}
}

func TestBothSidesAgreeOnTheSharedSecret(t *testing.T) {
	a, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	b, err := PrivateKeyFromBytes(bytes.Repeat([]byte{9}, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	ab, err1 := a.Shared(b.Public())
	ba, err2 := b.Shared(a.Public())
	if err1 != nil || err2 != nil || !bytes.Equal(ab, ba) {
		t.Errorf("%x and %x, %v, %v", ab, ba, err1, err2)
	}
	if _, err := a.Shared(Key{1}); err == nil {
		t.Error("a low-order point was taken")
	}
	if _, err := PrivateKeyFromBytes([]byte("short")); err == nil {
		t.Error("a short private key was taken")
	}
}

// No verb and no handler prints a secret.
func TestSecretsDoNotPrint(t *testing.T) {
	private, err := NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	const token = "eyJhbGciOi.secret.token"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		type holder struct {
			Token Secret
			Key   PrivateKey
		}
		text := fmt.Sprintf(verb+" "+verb+" "+verb, Secret(token), private, holder{token, private})
		if strings.Contains(text, "secret.token") || strings.Contains(text, fmt.Sprintf("%x", token)) ||
			strings.Contains(text, fmt.Sprintf("%x", private.Bytes())) || strings.Contains(text, fmt.Sprint(private.Bytes())) {
			t.Errorf("%s prints %s", verb, text)
		}
	}
	var out bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("x", "token", Secret(token), "key", private)
	}
	if strings.Contains(out.String(), "secret.token") || strings.Contains(out.String(), base64.StdEncoding.EncodeToString(private.Bytes())) {
		t.Errorf("a log shows %s", out.String())
	}
	data, err := json.Marshal(JoinRequest{Token: token})
	if err != nil || !strings.Contains(string(data), token) {
		t.Errorf("the API must carry the token: %s, %v", data, err)
	}
}

func TestDurationText(t *testing.T) {
	data, err := json.Marshal(Duration(90 * time.Second))
	if err != nil || string(data) != `"1m30s"` {
		t.Fatalf("%s, %v", data, err)
	}
	var d Duration
	if err := json.Unmarshal([]byte(`"10m"`), &d); err != nil || time.Duration(d) != 10*time.Minute {
		t.Errorf("%v, %v", time.Duration(d), err)
	}
	if err := json.Unmarshal([]byte(`"soon"`), &d); err == nil {
		t.Error("took soon for a duration")
	}
}

// A frame reads back as it was, whatever it carries.
func TestFrameEncode(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		f := Frame{Type: rapid.SampledFrom([]FrameType{FrameHello, FrameOffer, FrameEnd}).Draw(rt, "type"), ID: rapid.Uint64().Draw(rt, "id")}
		if rapid.Bool().Draw(rt, "body") {
			f.Body, _ = json.Marshal(rapid.MapOf(rapid.String(), rapid.String()).Draw(rt, "content"))
		}
		var got Frame
		if parsed, err := ParseFrame(f.Encode()); err != nil || parsed.Type != f.Type || parsed.ID != f.ID || !bytes.Equal(parsed.Body, f.Body) {
			rt.Fatalf("%+v came back as %+v, %v", f, parsed, err)
		}
		if err := json.Unmarshal(f.Encode(), &got); err != nil || got.Type != f.Type || got.ID != f.ID || !bytes.Equal(got.Body, f.Body) {
			rt.Fatalf("%s: %+v, %v", f.Encode(), got, err)
		}
	})
}

// FuzzParseFrame: what is read the short way is what encoding/json reads.
func FuzzParseFrame(f *testing.F) {
	for _, seed := range []string{
		`{"type":"offer","id":7,"body":{"a":[1,"}"]}}`, `{"type":"end","body":{"session":"x"},"id":3}`, `{"type":"end"}`, `{"type":"a","id":01}`, `{"type":"a","id":1e3}`,
		`{"type":"a","body":null}`, `{"type":"a","body": {} }`, `{"type":"a\u0062"}`, `{"type":"a","body":{}},"body":{}}`, `{"id":1,"type":"a"}`, `{"type":"a","body":}`, `{"type":"a",}`,
		`{"type":"a","id":18446744073709551616}`, `{"type":"a","body":{},"type":"b"}`, `{"type":"}`, ``, `{"type":"a","body":1 2}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var want Frame
		wantErr := json.Unmarshal(data, &want)
		got, err := ParseFrame(data)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%v, want %v", err, wantErr)
		}
		if err == nil && (got.Type != want.Type || got.ID != want.ID || string(bytes.TrimSpace(got.Body)) != string(want.Body)) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	})
}
