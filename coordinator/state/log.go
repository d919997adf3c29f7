package state

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/culvertnet/culvert/internal/problem"
)

const (
	logStream  = "culvert_audit"
	logSubject = "culvert.audit"
	keyStream  = "culvert_audit_key"
	keySubject = "culvert.audit.key"

	markStream  = "culvert_audit_mark"
	markSubject = "culvert.audit.mark"

	logSlack   = 256 << 20       // what the embedded server may use on disk beside the log itself, bytes
	appendWait = 2 * time.Second // one try; the writer of the log makes more of them
)

// LogOptions configure a [Log].
type LogOptions struct {
	Options                // embedded logs lie in the folder audit below Dir
	MaxAge   time.Duration // messages older than this are dropped; 0 keeps them
	MaxBytes int64         // and the oldest ones when all are larger than this; at least 1 MiB
	ReadOnly bool          // neither make nor change it; [ErrNotFound] where there is none
}

// Log is a stream to which messages are only ever appended: nothing in it can be changed, deleted or purged, only its
// oldest part is dropped by age and size. Every message is synced to the disk before it is acknowledged: by a
// server of its own where state is embedded, so that leases need not wait for the disk; on a cluster as far as its
// servers have `sync_interval: always`. It is safe for concurrent use.
type Log struct {
	embedded *embedded // nil with an existing cluster
	conn     *nats.Conn
	panel    *panel // nil where nobody may ask for elections
	js       jetstream.JetStream
	stream   jetstream.Stream
	marks    jetstream.Stream // nil where a log that is only read has none
	log      *slog.Logger
	escape   escape

	life  context.Context // ends with Close
	end   context.CancelFunc
	tasks sync.WaitGroup // the look after the leader
}

// LogInfo says what a [Log] holds. Sequences of messages count from 1; First is Last+1 in an empty one.
type LogInfo struct {
	First, Last uint64
	Messages    uint64
	Bytes       uint64
	MaxAge      time.Duration
	MaxBytes    int64
}

// Validate fills defaults.
func (o *LogOptions) Validate() error {
	if err := o.Options.Validate(); err != nil {
		return err
	}
	if o.MaxBytes < 1<<20 && !o.ReadOnly {
		return errors.New("a log needs room for at least 1 MiB")
	}
	return nil
}

// OpenLog starts or connects to NATS and makes the log ready. Its errors are those of [Open].
func OpenLog(ctx context.Context, opts LogOptions) (*Log, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	l := &Log{log: opts.Logger}
	l.life, l.end = context.WithCancel(context.WithoutCancel(ctx))
	if err := l.open(ctx, opts); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Log) open(ctx context.Context, opts LogOptions) (err error) {
	if len(opts.NATS) == 0 {
		dir := opts.Dir
		if dir != "" {
			dir = filepath.Join(dir, "audit")
		}
		how := storage{name: "culvert-audit", limit: opts.MaxBytes + logSlack, sync: true}
		if opts.ReadOnly {
			how.limit = 1 << 50
		}
		if l.embedded, err = startEmbedded(dir, how, l.log); err != nil {
			return err
		}
	}
	if opts.ReadOnly {
		opts.Elections = ""
	}
	if l.panel, err = newPanel(opts.Options); err != nil {
		return fmt.Errorf("connect to ask for elections: %w", err)
	}
	if l.conn, err = connectBeside(l.panel, opts.Options, l.embedded, make(chan struct{}, 1)); err != nil {
		return err
	}
	if l.js, err = jetstream.New(l.conn); err != nil {
		return err
	}
	if l.clustered() {
		l.escape.leave, l.escape.connected = l.conn.ForceReconnect, l.conn.IsConnected
	}
	if err = Patiently(ctx, l.log, func() error { return l.ready(ctx, opts) }); err == nil {
		err = Patiently(ctx, l.log, func() (err error) {
			l.marks, err = l.small(ctx, opts.ReadOnly, markStream, markSubject, jetstream.DiscardOld)
			return err
		})
	}
	if err != nil && !(opts.ReadOnly && errors.Is(err, ErrNotFound) && l.stream != nil) {
		return fmt.Errorf("make the audit log ready: %w", err)
	}
	if opts.ReadOnly {
		return nil
	}
	if l.escape.election = newElection(l.panel, l.log, l.conn, l.stream, l.escape.cutOff); l.escape.election != nil {
		l.tasks.Go(func() { l.escape.election.run(l.life) })
	}
	return nil
}

// ready finds or makes the stream, and gives it the limits that are asked for.
func (l *Log) ready(ctx context.Context, opts LogOptions) (err error) {
	if opts.ReadOnly {
		l.stream, err = l.js.Stream(ctx, logStream)
	} else {
		l.stream, err = findOrMake(ctx, l.js, l.clustered(), l.log, logConfig(opts))
	}
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return ErrNotFound
	}
	if err != nil {
		return noRoom(err, opts)
	}
	have := l.stream.CachedInfo().Config
	if !have.DenyDelete || !have.DenyPurge || have.Discard != jetstream.DiscardOld || have.Storage != jetstream.FileStorage {
		return fmt.Errorf("stream %s is set up for something else: it must deny delete and purge, and lie in files", logStream)
	}
	// A replica of a compressed stream that had been cut off was seen to refuse every write from then on (nats-server 2.15: "error
	// reading compression reader"), so what is written now is not compressed. What is there stays as it is.
	if opts.ReadOnly || (have.MaxAge == opts.MaxAge && have.MaxBytes == opts.MaxBytes && have.Compression == jetstream.NoCompression) {
		return nil
	}
	have.MaxAge, have.MaxBytes, have.Compression = opts.MaxAge, opts.MaxBytes, jetstream.NoCompression
	l.stream, err = l.js.UpdateStream(ctx, have)
	return noRoom(err, opts)
}

// storageExceeded is NATS's code for a stream that may get larger than what the server or the account has to give.
const storageExceeded = 10047

// noRoom names the setting that is too large for a cluster: the whole of a log's size is set aside at the start.
func noRoom(err error, opts LogOptions) error {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok && api.ErrorCode == storageExceeded {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("nats has no room for an audit log of %d MiB", opts.MaxBytes>>20),
			"give audit.max_size less, or nats more (max_file_store)")
	}
	return err
}

func (l *Log) clustered() bool { return l.conn.ConnectedClusterName() != "" }

func logConfig(opts LogOptions) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:         logStream,
		Description:  "Culvert: the audit log",
		Subjects:     []string{logSubject},
		MaxAge:       opts.MaxAge,
		MaxBytes:     opts.MaxBytes,
		MaxMsgs:      -1,
		MaxMsgSize:   -1,
		MaxConsumers: -1,
		Discard:      jetstream.DiscardOld,
		Storage:      jetstream.FileStorage,
		Compression:  jetstream.NoCompression, // see ready
		DenyDelete:   true,
		DenyPurge:    true,
		Replicas:     1,
	}
}

// Close ends the connection and the embedded server, and waits. It may be called more than once.
func (l *Log) Close() error {
	l.end()
	l.tasks.Wait()
	l.panel.close()
	if l.conn != nil {
		l.conn.Close()
	}
	if l.embedded != nil {
		return l.embedded.stop()
	}
	return nil
}

// MaxMessage is the largest message that the log takes, in bytes.
func (l *Log) MaxMessage() int { return int(l.conn.MaxPayload()) }

// Append stores a message right after the one whose sequence is after, and gives its own. It is on the disk by then.
// [ErrConflict] where another message is there already. After any other error, [ErrNoConnection] too, the message may or may not have been
// stored, and may yet be.
func (l *Log) Append(ctx context.Context, data []byte, after uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, appendWait)
	defer cancel()
	var ack *jetstream.PubAck
	err := l.escape.call(ctx, func(ctx context.Context) (err error) {
		ack, err = l.js.PublishMsg(ctx, &nats.Msg{Subject: logSubject, Data: data}, jetstream.WithExpectLastSequence(after), atOnce)
		return err
	})
	switch {
	case err == nil:
		return ack.Sequence, nil
	case wrongRevision(err):
		return 0, ErrConflict
	default:
		return 0, fmt.Errorf("append to the audit log: %w", l.escape.orBroken(err))
	}
}

// Get reads one message; [ErrNotFound] where there is none.
func (l *Log) Get(ctx context.Context, seq uint64) ([]byte, error) {
	m, err := l.message(ctx, seq)
	return m.Data, err
}

// message asks the leader for one.
func (l *Log) message(ctx context.Context, seq uint64) (Message, error) {
	var msg *jetstream.RawStreamMsg
	err := l.escape.tries(ctx, func(ctx context.Context) (err error) {
		msg, err = l.stream.GetMsg(ctx, seq)
		return err
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return Message{}, ErrNotFound
	}
	if err != nil {
		return Message{}, fmt.Errorf("read the audit log: %w", err)
	}
	return Message{msg.Sequence, msg.Time, msg.Data}, nil
}

// outdated is how long a cluster's leader may have heard from no majority and still be believed what it says of the log's end: members that have
// nothing to do answer every second.
const outdated = 2500 * time.Millisecond

// errCutOff says that what a server said may be long out of date.
var errCutOff = errors.New("the server that answers is cut off from the others")

// alone reports whether a leader has heard from most members, itself among them, longer ago than that. One that is cut off takes itself for the leader for
// another 10 to 20 s.
func alone(info *jetstream.ClusterInfo, than time.Duration) bool {
	heard := 1
	for _, r := range info.Replicas {
		if r.Active < than {
			heard++
		}
	}
	return 2*heard <= len(info.Replicas)+1
}

// Info says what the log holds at this moment.
func (l *Log) Info(ctx context.Context) (LogInfo, error) {
	var info *jetstream.StreamInfo
	err := l.escape.tries(ctx, func(ctx context.Context) (err error) {
		info, err = l.stream.Info(ctx)
		if err == nil && info.Cluster != nil && alone(info.Cluster, outdated) {
			l.escape.cutOff()
			err = errCutOff
		}
		return err
	})
	if err != nil {
		return LogInfo{}, fmt.Errorf("ask for the audit log: %w", err)
	}
	s := info.State
	out := LogInfo{First: s.FirstSeq, Last: s.LastSeq, Messages: s.Msgs, Bytes: s.Bytes, MaxAge: info.Config.MaxAge, MaxBytes: info.Config.MaxBytes}
	if s.LastSeq == 0 {
		out.First = 1
	}
	return out, nil
}

// small finds or makes a stream for one small message.
func (l *Log) small(ctx context.Context, readOnly bool, name, subject string, full jetstream.DiscardPolicy) (jetstream.Stream, error) {
	if readOnly {
		stream, err := l.js.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil, ErrNotFound
		}
		return stream, err
	}
	return findOrMake(ctx, l.js, l.clustered(), l.log, jetstream.StreamConfig{
		Name: name, Description: "Culvert: belongs to the audit log", Subjects: []string{subject}, MaxMsgs: 1, MaxBytes: 8192, MaxMsgSize: -1,
		MaxConsumers: -1, Discard: full, Storage: jetstream.FileStorage, DenyDelete: true, DenyPurge: true, Replicas: 1,
	})
}

// Seed gives 32 secret random bytes that belong to the log and are the same for everybody who opens it: the first one
// makes them. [ErrNotFound] where a log that is only read has none.
func (l *Log) Seed(ctx context.Context, readOnly bool) ([]byte, error) {
	var stream jetstream.Stream
	err := Patiently(ctx, l.log, func() (err error) {
		stream, err = l.small(ctx, readOnly, keyStream, keySubject, jetstream.DiscardNew)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make the audit log's key ready: %w", err)
	}
	fresh := make([]byte, 32)
	rand.Read(fresh) // never fails (crypto/rand)
	if !readOnly {   // loses against one that is there; which one it is, is read
		_, err = l.js.PublishMsg(ctx, &nats.Msg{Subject: keySubject, Data: fresh}, jetstream.WithExpectLastSequence(0))
		if err != nil && !wrongRevision(err) {
			return nil, fmt.Errorf("store the audit log's key: %w", err)
		}
	}
	msg, err := stream.GetMsg(ctx, 1)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read the audit log's key: %w", err)
	}
	if len(msg.Data) != len(fresh) {
		return nil, errors.New("the audit log's key is not 32 bytes long")
	}
	return msg.Data, nil
}

// Mark gives what SetMark stored last, nil where that never happened, and the revision that the next SetMark must name.
func (l *Log) Mark(ctx context.Context) (data []byte, revision uint64, err error) {
	if l.marks == nil {
		return nil, 0, nil
	}
	var msg *jetstream.RawStreamMsg
	err = l.escape.tries(ctx, func(ctx context.Context) (err error) {
		msg, err = l.marks.GetLastMsgForSubject(ctx, markSubject)
		return err
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read the audit log's mark: %w", err)
	}
	return msg.Data, msg.Sequence, nil
}

// SetMark replaces the log's mark, a small message that is kept apart from the others. ErrConflict where somebody
// else did since revision was read.
func (l *Log) SetMark(ctx context.Context, data []byte, revision uint64) error {
	err := l.escape.tries(ctx, func(ctx context.Context) error {
		_, err := l.js.PublishMsg(ctx, &nats.Msg{Subject: markSubject, Data: data}, jetstream.WithExpectLastSequence(revision), atOnce)
		return err
	})
	if err != nil && wrongRevision(err) {
		return ErrConflict
	}
	if err != nil {
		return fmt.Errorf("store the audit log's mark: %w", err)
	}
	return nil
}
