//go:build !linux

package forward

import "gvisor.dev/gvisor/pkg/tcpip"

// drain gives what copies all that the job has sent so far. Here a buffer is held while the target takes nothing.
func (r *relay) drain() (func() error, error) { return r.empty, nil }

func (r *relay) empty() error {
	buf := streams.Get().(*buffer)
	defer streams.Put(buf)
	for {
		w := tcpip.SliceWriter(buf.b)
		res, terr := r.ep.Read(&w, tcpip.ReadOptions{})
		if terr != nil {
			return readError(terr)
		}
		r.turn.leave() // the target may take its time
		n, err := r.conn.Write(buf.b[:res.Count])
		r.took(n)
		if err != nil {
			return writeError(err)
		}
	}
}
