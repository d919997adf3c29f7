package agent

import (
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// FuzzFrame feeds the gateway whatever a coordinator could send. Nothing of it opens a session, for no token is genuine.
func FuzzFrame(f *testing.F) {
	r := newRig(f, "", ownerID)
	r.issuer.SetNow(func() time.Time { return time.Unix(1, 0) }) // the seeds' tokens are long over
	o := r.fresh()
	f.Add(string(wire.FrameOffer), uint64(1), []byte(frame(wire.FrameOffer, 1, o).Body))
	f.Add(string(wire.FrameRenew), uint64(2), []byte(frame(wire.FrameRenew, 2, wire.Renewed{Session: o.Session, Token: o.Token}).Body))
	f.Add(string(wire.FrameCandidates), uint64(0), []byte(frame(wire.FrameCandidates, 0, wire.Trickle{Session: o.Session, Candidates: o.Candidates}).Body))
	f.Add(string(wire.FrameEnd), uint64(0), []byte(frame(wire.FrameEnd, 0, wire.End{Session: o.Session, Reason: "over"}).Body))
	f.Add("offer", uint64(3), []byte(`{"key":"`))
	f.Fuzz(func(t *testing.T, kind string, id uint64, body []byte) {
		g := &Gateway{log: r.door.log, door: r.door, table: r.door.table, out: newOutbox(), metrics: r.door.metrics, slots: make(chan struct{}, 1)}
		g.out.open()
		g.handle(t.Context(), wire.Frame{Type: wire.FrameType(kind), ID: id, Body: body})
		g.offers.Wait()
		if n := r.door.table.size(); n != 0 {
			t.Fatalf("%d sessions admitted", n)
		}
		answered := 0
		for _, a := range drain(g.out) {
			if a.Type == wire.FrameAnswer && a.ID == id && len(a.Body) > 2 {
				answered++
			}
		}
		if want := kind == string(wire.FrameOffer) || kind == string(wire.FrameRenew); want != (answered == 1) {
			t.Fatalf("%q answered %d times", kind, answered)
		}
	})
}
