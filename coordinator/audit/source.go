package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// Source is a log to read: a running coordinator's ([Remote]) or the store itself ([Local]).
type Source interface {
	// Verify holds all of the log against its chain.
	Verify(ctx context.Context, known Anchor) (Report, error)
	// Records calls yield for the records that q chooses, as the API's parameters do.
	Records(ctx context.Context, q url.Values, yield func(line []byte) bool) error
	// Export writes what q's since and until span, with the signed end.
	Export(ctx context.Context, q url.Values, w io.Writer) error
	// PublicKeys gives the keys that the log says are its own.
	PublicKeys(ctx context.Context) ([]string, error)
}

// Local reads the store itself.
type Local struct{ Reader *Reader }

// Verify implements [Source].
func (l Local) Verify(ctx context.Context, known Anchor) (Report, error) {
	return l.Reader.Verify(ctx, known)
}

// Records implements [Source].
func (l Local) Records(ctx context.Context, q url.Values, yield func([]byte) bool) error {
	f, err := ParseFilter(q, l.Reader.now())
	if err != nil {
		return err
	}
	newest, _ := strconv.Atoi(q.Get("last"))
	return l.Reader.Tail(ctx, f, newest, q.Get("follow") == "true", yield)
}

// Export implements [Source].
func (l Local) Export(ctx context.Context, q url.Values, w io.Writer) error {
	f, err := ParseFilter(q, l.Reader.now())
	if err != nil {
		return err
	}
	return l.Reader.Export(ctx, w, f.Since, f.Until)
}

// PublicKeys implements [Source].
func (l Local) PublicKeys(context.Context) ([]string, error) {
	var out []string
	for _, k := range l.Reader.Keys {
		out = append(out, PublicKey(k))
	}
	return out, nil
}

// Verify implements [Source].
func (c *Remote) Verify(ctx context.Context, known Anchor) (Report, error) {
	q := url.Values{}
	if known.Record > 0 {
		q.Set("record", strconv.FormatUint(known.Record, 10))
		q.Set("hash", known.Hash)
	}
	var rep Report
	return rep, c.decode(ctx, PathVerify, q, &rep)
}

func (c *Remote) decode(ctx context.Context, path string, q url.Values, v any) error {
	resp, err := c.get(ctx, path, q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(v)
}

// Records implements [Source].
func (c *Remote) Records(ctx context.Context, q url.Values, yield func([]byte) bool) error {
	resp, err := c.get(ctx, PathRecords, q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, MaxLine+1)
	for in.Scan() {
		if !yield(in.Bytes()) {
			return nil
		}
	}
	if err := in.Err(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("read the audit log: %w", err)
	}
	return nil
}

// Export implements [Source].
func (c *Remote) Export(ctx context.Context, q url.Values, w io.Writer) error {
	resp, err := c.get(ctx, PathExport, q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err = io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("export the audit log: %w", err)
	}
	return nil
}

// PublicKeys implements [Source].
func (c *Remote) PublicKeys(ctx context.Context) ([]string, error) {
	var answer struct{ Keys []string }
	return answer.Keys, c.decode(ctx, PathKey, nil, &answer)
}

// LoadKey reads the key that signs a log from a PEM file with an Ed25519 key in PKCS #8, as `openssl genpkey -algorithm
// ed25519` writes it. Its errors are *problem.Error with code bad-config and hold nothing of the file.
func LoadKey(file string) (ed25519.PrivateKey, error) {
	const next = "make one with: openssl genpkey -algorithm ed25519 -out FILE"
	info, err := os.Stat(file)
	if err == nil && info.Size() > 1<<16 {
		err = errors.New("it is too large for a key")
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, "the audit log's key file cannot be read: "+err.Error(), next)
	}
	if block, _ := pem.Decode(data); block != nil {
		if key, perr := x509.ParsePKCS8PrivateKey(block.Bytes); perr == nil {
			if k, ok := key.(ed25519.PrivateKey); ok {
				return k, nil
			}
		}
	}
	return nil, problem.New(problem.BadConfig, fmt.Sprintf("the audit log's key file %s holds no Ed25519 key", file), next)
}

// Seeder is a store that keeps a key of its own: a [state.Log].
type Seeder interface {
	Seed(ctx context.Context, readOnly bool) ([]byte, error)
}

// Keys gives the key that signs a log, from a file or, where file is empty, the store's own, and its former ones.
func Keys(ctx context.Context, store Seeder, file string, former []string, readOnly bool) (ed25519.PrivateKey, []ed25519.PublicKey, error) {
	old, err := ParseKeys(former)
	if err != nil {
		return nil, nil, err
	}
	if file != "" {
		key, err := LoadKey(file)
		return key, old, err
	}
	seed, err := store.Seed(ctx, readOnly)
	if err != nil {
		return nil, nil, err
	}
	return ed25519.NewKeyFromSeed(seed), old, nil
}

// ParseKeys reads public keys. Its errors are *problem.Error with code bad-config.
func ParseKeys(texts []string) ([]ed25519.PublicKey, error) {
	var out []ed25519.PublicKey
	for _, s := range texts {
		k, err := ParsePublicKey(s)
		if err != nil {
			return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("%q is no public key of an audit log", clip(s, 80)), "write it as `culvert-coordinator audit verify` prints it")
		}
		out = append(out, k)
	}
	return out, nil
}

// EndOf gives the record with which an export ends, and the key that the end names. It is not verified here.
func EndOf(export io.Reader) (Anchor, string, error) {
	var last []byte
	if err := eachLine(export, func(text []byte) { last = append(last[:0], text...) }); err != nil {
		return Anchor{}, "", err
	}
	l, err := parseLine(bytes.TrimSpace(last))
	if err != nil || l.end == nil {
		return Anchor{}, "", problem.New(problem.BadRequest, "the export has no end", "its tail was cut off, or it is none; verify it first")
	}
	return Anchor{l.end.Last, l.end.Head}, l.end.Key, nil
}

// Select calls f for the records of an export, or of a log's copy, that q chooses. Nothing is verified.
func Select(r io.Reader, q url.Values, f func(line []byte)) error {
	filter, err := ParseFilter(q, time.Now())
	if err != nil {
		return err
	}
	return eachLine(r, func(text []byte) {
		if filter.matches(text) {
			f(text)
		}
	})
}
