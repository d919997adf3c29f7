//go:build !linux

package cork

// Await returns at once: reads wait.
func (c *Conn) Await() {}

func (c *Conn) readDry(p []byte) (int, error) { return c.Conn.Read(p) }
