//go:build !unix

package forward

// next reads and hands on what it has read. It returns io.EOF at the end of a stream. Here a buffer is held while the
// read waits.
func (s *source) next() error {
	buf := s.pool.Get().(*buffer)
	defer s.pool.Put(buf)
	n, err := s.conn.Read(buf.b)
	if n > 0 || err == nil {
		if uerr := s.use(buf.b[:n]); uerr != nil {
			return uerr
		}
	}
	return err
}

func (*source) try(uintptr) bool { return true }
