package state

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	bucketName = "culvert"
	streamName = "KV_" + bucketName
	subjects   = "$KV." + bucketName + "."

	// markerTTL is how long the bucket remembers that a key is gone, for watches that are behind. A watch that was
	// away for longer starts over. A key that is erased is remembered for longer where an older value could still live: after
	// kill -9 NATS rebuilds its stream from its files, and finds replaced values again whose successor has gone.
	markerTTL = time.Minute

	// anyRevision writes whatever there is.
	anyRevision = ^uint64(0)

	operationHeader = "KV-Operation" // ADR-8 of NATS
	operationPurge  = "PURGE"
)

// prefixes of keys by kind.
var prefixes = [kinds]string{leaseKind: "session.", addressKind: "address.", gatewayKind: "gateway."}

// bucket is a NATS key-value bucket as other tools know it. It is written to below nats.go's own API, which cannot
// set a new lifetime when it replaces a value.
type bucket struct {
	js     jetstream.JetStream
	stream jetstream.Stream
	mirror *mirror
	log    *slog.Logger

	now     func() time.Time
	expired chan Lease
	escape  escape

	resumable time.Duration // the watch's

	mu      sync.Mutex
	writing map[string]write // by key: what this node is writing
}

// write is a value on its way, so that it need not be decoded when the watch brings it back before the bucket's
// acknowledgement is here.
type write struct {
	data   []byte
	record record
}

// begins notes what is being written.
func (b *bucket) begins(key string, w write) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writing[key] = w
}

func (b *bucket) ends(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.writing, key)
}

// ours gives the record of a value that this node is writing, nil where it is another one.
func (b *bucket) ours(key string, data []byte) record {
	b.mu.Lock()
	defer b.mu.Unlock()
	if w, ok := b.writing[key]; ok && bytes.Equal(w.data, data) {
		return w.record
	}
	return nil
}

// openBucket finds or makes the bucket: three replicas where there is a cluster that can, one elsewhere.
func openBucket(ctx context.Context, conn *nats.Conn, now func() time.Time, log *slog.Logger) (*bucket, error) {
	js, err := jetstream.New(conn)
	if err != nil {
		return nil, err
	}
	b := &bucket{js: js, mirror: newMirror(), log: log, now: now, writing: map[string]write{}, expired: make(chan Lease, maxExpired)}
	if clustered := conn.ConnectedClusterName() != ""; clustered {
		b.escape.leave, b.escape.connected = conn.ForceReconnect, conn.IsConnected
	}
	if b.stream, err = findOrMake(ctx, js, conn.ConnectedClusterName() != "", log, bucketConfig()); err != nil {
		return nil, err
	}
	if c := b.stream.CachedInfo().Config; !c.AllowMsgTTL || c.MaxMsgsPerSubject != 1 || c.SubjectDeleteMarkerTTL == 0 {
		return nil, fmt.Errorf("stream %s is set up for something else: it needs a history of 1, message TTLs and delete markers", streamName)
	}
	return b, nil
}

func bucketConfig() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:                   streamName,
		Description:            "Culvert: sessions, addresses and gateways",
		Subjects:               []string{subjects + ">"},
		MaxMsgsPerSubject:      1,
		MaxMsgs:                -1,
		MaxBytes:               -1,
		MaxMsgSize:             -1,
		MaxConsumers:           -1,
		Discard:                jetstream.DiscardNew,
		Storage:                jetstream.FileStorage,
		Duplicates:             2 * time.Minute,
		DenyDelete:             true,
		AllowRollup:            true,
		AllowMsgTTL:            true,
		SubjectDeleteMarkerTTL: markerTTL,
		AllowDirect:            false, // reads go to the leader: what one node wrote, another reads
		Replicas:               1,
	}
}

// write stores r for as long as it lives by its own word, and at least for a second, over the revision expect: 0
// where there must be nothing, [anyRevision] for whatever there is. [ErrConflict] where there is something else.
func (b *bucket) write(ctx context.Context, k kind, id string, r record, expect uint64, now time.Time) (uint64, error) {
	data, err := encode(r)
	if err != nil {
		return 0, fmt.Errorf("encode: %w", err)
	}
	// The bucket counts whole seconds and cuts off the rest; it must not be the first to end a record.
	ttl := max(r.until().Sub(now), r.lasting().Sub(now), 0).Truncate(time.Second) + 2*time.Second + b.grace(k)
	msg := &nats.Msg{Subject: subjects + prefixes[k] + id, Data: data, Header: nats.Header{}}
	return b.publish(ctx, msg, k, id, r, expect, ttl)
}

// grace is how much longer a lease is kept because it says who holds its address.
func (b *bucket) grace(k kind) time.Duration {
	if k == leaseKind && b.mirror.holds != nil {
		return addressGrace
	}
	return 0
}

// erase removes a key at the revision expect, or at [anyRevision]. lasting is until when a value under it could live.
func (b *bucket) erase(ctx context.Context, k kind, id string, expect uint64, lasting, now time.Time) error {
	msg := &nats.Msg{Subject: subjects + prefixes[k] + id, Header: nats.Header{
		operationHeader:     {operationPurge},
		jetstream.MsgRollup: {jetstream.MsgRollupSubject},
	}}
	ttl := markerTTL + max(lasting.Sub(now), 0).Truncate(time.Second) + b.grace(k)
	_, err := b.publish(ctx, msg, k, id, nil, expect, ttl)
	return err
}

func (b *bucket) publish(ctx context.Context, msg *nats.Msg, k kind, id string, r record, expect uint64, ttl time.Duration) (uint64, error) {
	opts := []jetstream.PublishOpt{jetstream.WithMsgTTL(ttl)}
	if expect != anyRevision {
		opts = append(opts, jetstream.WithExpectLastSequencePerSubject(expect))
	}
	if l, ok := r.(Lease); ok {
		c, err := pack(l)
		if err != nil {
			return 0, err
		}
		r = c
	}
	key := prefixes[k] + id
	if r != nil {
		b.begins(key, write{msg.Data, r})
		defer b.ends(key)
	}
	revision, err := b.store(ctx, msg, expect, opts...)
	if err != nil {
		return 0, err
	}
	r = revised(r, revision)
	b.mirror.wrote(k, id, r, revision)
	return revision, nil
}

// refresh brings what stands under a key into the mirror, which has turned out to be behind.
func (b *bucket) refresh(ctx context.Context, k kind, id string) {
	r, revision, err := b.read(ctx, k, id)
	if err != nil || revision == 0 {
		return // the watch brings it
	}
	if l, ok := r.(Lease); ok {
		if r, err = pack(l); err != nil {
			return
		}
	}
	b.mirror.wrote(k, id, r, revision)
}

// revised is a record at a revision; packed leases know theirs.
func revised(r record, revision uint64) record {
	c, ok := r.(*compact)
	if !ok {
		return r
	}
	at := *c
	at.revision = revision
	return &at
}

func wrongRevision(err error) bool {
	apiErr, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
		apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// read gives the record under a key, expired or not, and the revision that a write over it must expect. The record is
// nil where there is none; the revision may be one even then, of the marker that it is gone.
func (b *bucket) read(ctx context.Context, k kind, id string) (record, uint64, error) {
	msg, err := b.last(ctx, subjects+prefixes[k]+id)
	switch {
	case err != nil:
		return nil, 0, err
	case msg == nil:
		return nil, 0, nil
	case gone(msg):
		return nil, msg.Sequence, nil
	}
	r, err := decode(k, msg.Data, msg.Sequence)
	return r, msg.Sequence, err
}

// packed is decode for the mirror.
func packed(k kind, data []byte, revision uint64) (record, error) {
	r, err := decode(k, data, revision)
	if l, ok := r.(Lease); ok && err == nil {
		return pack(l)
	}
	return r, err
}

func decode(k kind, data []byte, revision uint64) (record, error) {
	var err error
	switch k {
	case leaseKind:
		var l Lease
		err = json.Unmarshal(data, &l)
		l.Revision = revision
		return l, err
	case addressKind:
		var h holder
		err = json.Unmarshal(data, &h)
		return h, err
	default:
		var p presence
		err = json.Unmarshal(data, &p)
		return p, err
	}
}

// token makes s one token of a NATS subject: bytes other than letters, digits, - and _ become = and their hex.
func token(s string) string {
	plain := func(c byte) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
	}
	if s == "" {
		return "="
	}
	odd := 0
	for i := range len(s) {
		if !plain(s[i]) {
			odd++
		}
	}
	if odd == 0 { // nearly always: it costs nothing and keeps nothing
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 2*odd)
	for i := range len(s) {
		if plain(s[i]) {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "=%02X", s[i])
		}
	}
	return b.String()
}
