package vm

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// client asks a disk as QEMU does.
type client struct {
	t    *testing.T
	conn net.Conn
}

func dial(t *testing.T, socket string) *client {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c := &client{t, conn}
	c.read(18)
	c.write(uint32(3))
	c.write(uint64(magicOption), uint32(8), uint32(0)) // structured replies
	if b := c.read(20); binary.BigEndian.Uint32(b[12:]) != replyUnsupported {
		t.Fatalf("% x", b)
	}
	c.write(uint64(magicOption), uint32(optGo), uint32(6), uint32(0), uint16(0))
	c.read(20 + 12 + 20)
	return c
}

func (c *client) write(words ...any) {
	c.t.Helper()
	var b bytes.Buffer
	for _, w := range words {
		if err := binary.Write(&b, binary.BigEndian, w); err != nil {
			c.t.Fatal(err)
		}
	}
	if _, err := c.conn.Write(b.Bytes()); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.conn, b); err != nil {
		c.t.Fatal(err)
	}
	return b
}

// do does one request and gives what it answers with, nil for an error.
func (c *client) do(flags, kind uint16, sector, n int, data []byte) []byte {
	c.t.Helper()
	c.write(request{magicRequest, flags, kind, 1, uint64(sector) * sectorSize, uint32(n) * sectorSize}, data)
	if code := binary.BigEndian.Uint32(c.read(16)[4:]); code != 0 {
		return nil
	}
	if kind == cmdRead {
		return c.read(n * sectorSize)
	}
	return []byte{}
}

// TestDiskLosesWhatWasNotFlushed: what was flushed, or written through, outlives the loss of power; of the rest some does. Until then all is read back.
func TestDiskLosesWhatWasNotFlushed(t *testing.T) {
	const sectors = 64
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(file, make([]byte, sectors*sectorSize), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := NewDisk(file, socket)
	if err != nil {
		t.Fatal(err)
	}
	fill := func(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*sectorSize) }
	c := dial(t, socket)
	c.do(0, cmdWrite, 0, 8, fill('a', 8))
	c.do(0, cmdFlush, 0, 0, nil)
	c.do(flagFUA, cmdWrite, 8, 8, fill('b', 8))
	c.do(0, cmdWrite, 0, sectors, append(append(fill('c', 8), fill('b', 8)...), fill('d', sectors-16)...))
	if got := c.do(0, cmdRead, 0, sectors, nil); got[0] != 'c' || got[len(got)-1] != 'd' {
		t.Error("what was written is not read back")
	}
	if c.do(0, cmdRead, sectors, 1, nil) != nil {
		t.Error("it reads beyond its end")
	}
	kept, lost, err := d.PowerLoss(rand.New(rand.NewPCG(1, 2)))
	if err != nil || kept+lost != sectors || kept == 0 || lost == 0 {
		t.Errorf("%d kept, %d lost, %v", kept, lost, err)
	}
	got := dial(t, socket).do(0, cmdRead, 0, sectors, nil)
	for i := range sectors {
		sector := got[i*sectorSize : (i+1)*sectorSize]
		old, last := byte('a'), byte('c')
		switch {
		case i >= 16:
			old, last = 0, 'd'
		case i >= 8:
			old, last = 'b', 'b'
		}
		if !bytes.Equal(sector, fill(old, 1)) && !bytes.Equal(sector, fill(last, 1)) {
			t.Errorf("sector %d is torn, or neither old nor new: %q", i, sector[0])
		}
	}
	if d.Flushes() != 1 {
		t.Errorf("%d flushes", d.Flushes())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestModulesInOrder: what a module needs is loaded before it, once.
func TestModulesInOrder(t *testing.T) {
	deps := "a/net.ko: a/core.ko a/ring.ko\na/ring.ko:\na/core.ko: a/ring.ko\na/blk.ko: a/ring.ko\n"
	got := moduleList(deps, []string{"net", "blk"})
	want := []string{"a/ring.ko", "a/core.ko", "a/net.ko", "a/blk.ko"}
	if len(got) != len(want) {
		t.Fatal(got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatal(got)
		}
	}
}
