package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"
)

// The log is lines of JSON, each at most MaxLine bytes. A record's first member is prev, the hash of the line before it, and its
// metadata.sequence counts from 1; so a line that is changed, taken out, put in or moved breaks the chain at that place.
//
//	{"prev":"","metadata":{…,"sequence":1},…}
//	{"prev":"hash of line 1","metadata":{…,"sequence":2},…}
//	{"seal":{"first":1,"last":2,"head":"hash of line 2",…,"sig":"…"}}
//
// A seal follows every group of records that was stored at once: the signature of the coordinator that wrote them, without
// which anybody could go on with the chain. An export ends with an end, which is signed too, so that one whose tail was
// cut off is known from one that ended there.

// MaxLine bounds a line of the log, in bytes.
const MaxLine = 512 << 10

// hash is the hash of a line without its newline: SHA-256 in base64url.
func hashOf(line []byte) string {
	sum := sha256.Sum256(line)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// head is where a chain stands.
type head struct {
	seq  uint64
	hash string // of record seq; "" before the first
}

// encode gives a record without what the chain adds to it.
func encode(r Record, now time.Time) ([]byte, error) {
	if _, ok := kinds[r.Event]; !ok {
		return nil, fmt.Errorf("%q is no event", r.Event)
	}
	r.complete(now)
	body, err := json.Marshal(r)
	if err == nil && len(body) > MaxLine/2 && r.Unmapped.Grants != nil {
		r.Unmapped.Grants, r.Message = nil, fmt.Sprintf("%d grants are left out; the rules give them", len(r.Unmapped.Grants))
		body, err = json.Marshal(r)
	}
	if err != nil {
		return nil, fmt.Errorf("encode a record: %w", err)
	}
	if len(body) > MaxLine-1024 {
		return nil, fmt.Errorf("a record of %d bytes is too large", len(body))
	}
	return body, nil
}

// link appends a record's line to block and gives the chain's new head. body comes from encode, node is JSON.
func link(block []byte, at head, event Event, node, body []byte) ([]byte, head) {
	start := len(block)
	block = append(block, `{"prev":"`...)
	block = append(block, at.hash...)
	block = append(block, `","metadata":{"version":"`+schemaVersion+`","product":{"name":"Culvert","vendor_name":"Culvert"},"log_provider":`...)
	block = append(block, node...)
	block = append(block, `,"event_code":"`...)
	block = append(block, event...)
	block = append(block, `","sequence":`...)
	block = strconv.AppendUint(block, at.seq+1, 10)
	block = append(block, `},`...)
	block = append(block, body[1:]...) // without its brace
	next := head{at.seq + 1, hashOf(block[start:])}
	return append(block, '\n'), next
}

// Seal is the coordinator's signature on records First to Last, of which the last has the hash Head.
type Seal struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Head  string `json:"head"`
	Time  int64  `json:"time"` // milliseconds since 1970
	Node  string `json:"node"`
	Sig   string `json:"sig"` // Ed25519, base64url
}

// Ending closes an export of records First to Last.
type Ending struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Head  string `json:"head"`
	Time  int64  `json:"time"`
	Key   string `json:"key"` // the public key, for reference: whoever verifies should know it from elsewhere
	Sig   string `json:"sig"`
}

func (s *Seal) message() []byte {
	return fmt.Appendf(nil, "culvert audit seal v1\n%d\n%d\n%s\n%d\n%s", s.First, s.Last, s.Head, s.Time, s.Node)
}

func (e *Ending) message() []byte {
	return fmt.Appendf(nil, "culvert audit end v1\n%d\n%d\n%s\n%d\n%s", e.First, e.Last, e.Head, e.Time, e.Key)
}

func sign(key ed25519.PrivateKey, message []byte) string {
	return base64.RawURLEncoding.EncodeToString(ed25519.Sign(key, message))
}

// signed reports whether one of the keys made a signature.
func signed(keys []ed25519.PublicKey, message []byte, sig string) bool {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(sig)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(keys, func(k ed25519.PublicKey) bool { return ed25519.Verify(k, message, raw) })
}

// seal appends the seal's line for records first to at.seq.
func seal(block []byte, first uint64, at head, node string, now time.Time, key ed25519.PrivateKey) []byte {
	s := Seal{First: first, Last: at.seq, Head: at.hash, Time: now.UnixMilli(), Node: node}
	s.Sig = sign(key, s.message())
	line, _ := json.Marshal(struct {
		Seal Seal `json:"seal"`
	}{s}) // strings and numbers alone: it always encodes
	return append(append(block, line...), '\n')
}

// end gives the end's line.
func end(first uint64, at head, now time.Time, key ed25519.PrivateKey) []byte {
	e := Ending{First: first, Last: at.seq, Head: at.hash, Time: now.UnixMilli(), Key: PublicKey(key.Public().(ed25519.PublicKey))}
	e.Sig = sign(key, e.message())
	line, _ := json.Marshal(struct {
		End Ending `json:"end"`
	}{e}) // as above
	return append(line, '\n')
}

// PublicKey gives a log's public key as text: base64url.
func PublicKey(k ed25519.PublicKey) string { return base64.RawURLEncoding.EncodeToString(k) }

// ParsePublicKey reads what [PublicKey] gives.
func ParsePublicKey(s string) (ed25519.PublicKey, error) {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(raw) != ed25519.PublicKeySize {
		return nil, errors.New("an audit key is 43 characters of base64url, as `audit verify` prints it")
	}
	return raw, nil
}

// line is what a line of the log turns out to be: exactly one of seal, end and record.
type line struct {
	seal *Seal
	end  *Ending
	prev string
	seq  uint64
	time int64
}

// errLine says that something is no line of a log.
var errLine = errors.New("not a line of an audit log")

// parseLine reads a line as far as the chain needs it.
func parseLine(data []byte) (line, error) {
	var raw struct {
		Seal     *Seal   `json:"seal"`
		End      *Ending `json:"end"`
		Prev     *string `json:"prev"`
		Time     int64   `json:"time"`
		Metadata struct {
			Sequence uint64 `json:"sequence"`
		} `json:"metadata"`
	}
	if len(data) > MaxLine || json.Unmarshal(data, &raw) != nil {
		return line{}, errLine
	}
	l := line{seal: raw.Seal, end: raw.End, seq: raw.Metadata.Sequence, time: raw.Time}
	if raw.Prev != nil {
		l.prev = *raw.Prev
	}
	record := raw.Prev != nil && raw.Metadata.Sequence > 0
	if count := b2i(raw.Seal != nil) + b2i(raw.End != nil) + b2i(record); count != 1 {
		return line{}, errLine
	}
	return l, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// errForeign says that a block is none that a coordinator with our key wrote at this place.
var errForeign = errors.New("not written by a coordinator with this log's key")

// checkBlock reads a block that follows at, or any where at is nil, and gives the head after it.
func checkBlock(block []byte, at *head, keys []ed25519.PublicKey) (head, error) {
	lines := bytes.Split(bytes.TrimSuffix(block, []byte{'\n'}), []byte{'\n'})
	if len(lines) < 2 {
		return head{}, errForeign
	}
	var now head
	for i, text := range lines[:len(lines)-1] {
		l, err := parseLine(text)
		if err != nil || l.seal != nil || l.end != nil {
			return head{}, errForeign
		}
		if i == 0 && at == nil {
			now = head{l.seq - 1, l.prev}
		} else if i == 0 {
			now = *at
		}
		if l.seq != now.seq+1 || l.prev != now.hash {
			return head{}, errForeign
		}
		now = head{l.seq, hashOf(text)}
	}
	l, err := parseLine(lines[len(lines)-1])
	if err != nil || l.seal == nil || l.seal.Last != now.seq || l.seal.Head != now.hash || l.seal.First != now.seq-uint64(len(lines))+2 ||
		!signed(keys, l.seal.message(), l.seal.Sig) {
		return head{}, errForeign
	}
	return now, nil
}

func sortedKeys[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
