package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

// Reader reads a log that this or another process writes.
type Reader struct {
	Store Store
	Key   ed25519.PrivateKey  // signs the end of exports; without it only Keys are of use
	Keys  []ed25519.PublicKey // that are believed; Key's own is among them
	Now   func() time.Time    // default time.Now
}

// NewReader gives a reader of a store whose log key signs, and whose former keys are believed too.
func NewReader(store Store, key ed25519.PrivateKey, former ...ed25519.PublicKey) *Reader {
	return &Reader{Store: store, Key: key, Keys: append([]ed25519.PublicKey{key.Public().(ed25519.PublicKey)}, former...)}
}

// Reader gives a reader of the log that l writes.
func (l *Log) Reader() *Reader {
	return &Reader{Store: l.opts.Store, Key: l.opts.Key, Keys: l.keys, Now: l.opts.Now}
}

func (r *Reader) now() time.Time {
	if r.Now == nil {
		return time.Now()
	}
	return r.Now()
}

// last gives the last message of the store at this moment, or 0 where it is empty.
func (r *Reader) last(ctx context.Context) (uint64, state.LogInfo, error) {
	info, err := r.Store.Info(ctx)
	if err != nil || info.Messages == 0 {
		return 0, info, err
	}
	return info.Last, info, nil
}

// Verify holds the whole log as it is stored now against its chain, its mark, its retention and a record that is known
// from elsewhere.
func (r *Reader) Verify(ctx context.Context, known Anchor) (Report, error) {
	v := NewVerifier(r.Keys...)
	v.anchor = known
	marked, _, err := r.Store.Mark(ctx) // before the log is read: what is marked by now has to be there
	if err != nil {
		return Report{}, err
	}
	last, info, err := r.last(ctx)
	if err != nil {
		return Report{}, err
	}
	next := info.First
	for next <= last {
		err = r.Store.Read(ctx, next, false, func(m state.Message) bool {
			if m.Sequence > next {
				v.report.find(v.at.seq+1, "something was taken out of the store behind record %d", v.at.seq)
			}
			v.block(m.Data)
			next = m.Sequence + 1
			return next <= last
		})
		if err != nil {
			return Report{}, err
		}
		if next <= last { // its end is gone
			v.report.find(v.at.seq+1, "what was stored behind record %d is gone", v.at.seq)
			break
		}
	}
	r.checkMark(v, marked, info)
	r.checkBegin(v, info)
	return v.Finish(false), nil
}

// block takes a stored message: it ends with a seal of its own.
func (v *Verifier) block(data []byte) {
	for text := range bytes.SplitSeq(bytes.TrimSuffix(data, []byte{'\n'}), []byte{'\n'}) {
		v.Line(text)
	}
	v.unsealed()
}

// checkMark finds out whether the log's end is there.
func (r *Reader) checkMark(v *Verifier, data []byte, info state.LogInfo) {
	marked, ok := readMark(data, r.Keys)
	switch {
	case len(data) > 0 && !ok:
		v.report.find(0, "the mark of how far the log reaches was not made by the coordinator")
	case ok && marked.seq > v.at.seq && (v.report.Records > 0 || info.Last == 0): // else age has emptied the log
		v.report.find(v.at.seq+1, "the log once reached to record %d: its end is gone", marked.seq)
	}
}

// retentionSlack is how much younger or smaller than its bounds a log may be whose beginning is gone.
const retentionSlack = 0.9

// checkBegin finds out whether retention explains that the log's beginning is gone. Bounds that were raised lately explain
// it too, which nobody can tell from here, so the finding says so.
func (r *Reader) checkBegin(v *Verifier, info state.LogInfo) {
	if v.report.Records == 0 || v.report.First == 1 {
		return
	}
	age := r.now().Sub(v.report.From)
	byAge := info.MaxAge > 0 && float64(age) >= retentionSlack*float64(info.MaxAge)
	bySize := info.MaxBytes > 0 && float64(info.Bytes) >= retentionSlack*float64(info.MaxBytes)-2*maxBlock
	if !byAge && !bySize {
		v.report.find(v.report.First, "the log begins with record %d, and neither age nor size explains what became of those before (unless these bounds were raised lately)", v.report.First)
	}
}

// Export writes the records of a time span with their seals, in whole blocks, and the signed end. A zero time stands
// for the beginning, or for now.
func (r *Reader) Export(ctx context.Context, w io.Writer, since, until time.Time) error {
	if r.Key == nil {
		return errors.New("the log's key is not known here, so an export's end cannot be signed")
	}
	last, info, err := r.last(ctx)
	if err != nil {
		return err
	}
	e := exporter{w: w}
	if last > 0 {
		err = r.Store.Read(ctx, info.First, false, func(m state.Message) bool {
			if until.IsZero() || !m.Time.After(until) {
				e.block(m, since)
			}
			return e.err == nil && m.Sequence < last && (until.IsZero() || !m.Time.After(until))
		})
	}
	if err = errors.Join(err, e.err); err != nil {
		return err
	}
	_, err = w.Write(end(e.first, e.at, r.now(), r.Key))
	return err
}

// exporter writes blocks and keeps what the end says.
type exporter struct {
	w     io.Writer
	first uint64
	at    head
	err   error
}

func (e *exporter) block(m state.Message, since time.Time) {
	if m.Time.Before(since) {
		return
	}
	for text := range bytes.SplitSeq(records(m.Data), []byte{'\n'}) {
		if l, err := parseLine(text); err == nil && l.seq > 0 {
			e.at = head{l.seq, hashOf(text)}
			if e.first == 0 {
				e.first = l.seq
			}
		}
	}
	_, e.err = e.w.Write(m.Data)
}

// Tail calls yield for the records that match, oldest first, until it says false: all that are stored, and with follow those
// that come until ctx ends. newest, where above 0, leaves all but the last of the stored ones out.
func (r *Reader) Tail(ctx context.Context, f Filter, newest int, follow bool, yield func(line []byte) bool) error {
	last, info, err := r.last(ctx)
	if err != nil {
		return err
	}
	from := info.First
	if newest > 0 {
		if from, err = r.newest(ctx, f, newest, info, last, yield); err != nil || from == 0 {
			return err
		}
	}
	if !follow && from > last {
		return nil
	}
	return r.Store.Read(ctx, from, follow, func(m state.Message) bool {
		return eachRecord(m.Data, f, yield) && (follow || m.Sequence < last)
	})
}

// newest yields the last records that match among those that are stored, and gives where to go on; 0 where yield has had
// enough. It reads back in steps that double, because those that are asked for mostly stand near the end.
func (r *Reader) newest(ctx context.Context, f Filter, count int, info state.LogInfo, last uint64, yield func([]byte) bool) (uint64, error) {
	for step := uint64(64); last > 0; step *= 4 {
		from := info.First
		if last >= info.First+step {
			from = last - step
		}
		ring := make([][]byte, 0, min(count, 1024))
		err := r.Store.Read(ctx, from, false, func(m state.Message) bool {
			return eachRecord(m.Data, f, func(text []byte) bool {
				if len(ring) == count {
					copy(ring, ring[1:])
					ring = ring[:count-1]
				}
				ring = append(ring, bytes.Clone(text))
				return true
			}) && m.Sequence < last
		})
		if err != nil {
			return 0, err
		}
		if len(ring) < count && from > info.First {
			continue
		}
		for _, text := range ring {
			if !yield(text) {
				return 0, nil
			}
		}
		break
	}
	return max(last+1, info.First), nil
}

// eachRecord calls yield for the records of a block that match.
func eachRecord(block []byte, f Filter, yield func([]byte) bool) bool {
	for text := range bytes.SplitSeq(bytes.TrimSuffix(block, []byte{'\n'}), []byte{'\n'}) {
		if f.matches(text) && !yield(text) {
			return false
		}
	}
	return true
}
