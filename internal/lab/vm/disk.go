package vm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
)

// Disk is a disk with a write cache, as disks have them: what was written and not flushed since may be on the disk or not when the power goes,
// each sector for itself. It is served to a virtual machine as a network block device
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md), with what of that QEMU uses.
type Disk struct {
	size int64

	mu       sync.Mutex
	file     *os.File                   // what is safe
	written  map[int64][sectorSize]byte // sectors that are not, by number
	flushes  int
	conn     net.Conn
	listener net.Listener
	wg       sync.WaitGroup
}

const sectorSize = 512

// NewDisk makes a disk of a file, whose size must be a multiple of a sector's, and serves it on a socket until Close.
func NewDisk(file, socket string) (*Disk, error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (info.Size() == 0 || info.Size()%sectorSize != 0) {
		err = fmt.Errorf("%s is %d bytes long: not a number of sectors", file, info.Size())
	}
	d := &Disk{file: f, written: map[int64][sectorSize]byte{}}
	if err == nil {
		d.size = info.Size()
		d.listener, err = net.Listen("unix", socket)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d.wg.Go(d.accept)
	return d, nil
}

// Close ends the connection and gives up the file.
func (d *Disk) Close() error {
	err := d.listener.Close()
	d.mu.Lock()
	if d.conn != nil {
		_ = d.conn.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
	return errors.Join(err, d.file.Close())
}

// PowerLoss drops what was written and not flushed, each sector with the chance of one half, and gives how many were kept and lost. The machine must be dead.
func (d *Disk) PowerLoss(r *rand.Rand) (kept, lost int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil { // what the dead machine still has under way is lost, too
		_ = d.conn.Close()
		d.conn = nil
	}
	for n, data := range d.written {
		if r.IntN(2) == 0 {
			lost++
			continue
		}
		kept++
		if _, err := d.file.WriteAt(data[:], n*sectorSize); err != nil {
			return kept, lost, err
		}
	}
	clear(d.written)
	return kept, lost, nil
}

// Flushes counts how often the machine had the disk make safe what it had written.
func (d *Disk) Flushes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushes
}

// accept serves one machine after the other.
func (d *Disk) accept() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		d.mu.Lock()
		if d.conn != nil {
			_ = d.conn.Close()
		}
		d.conn = conn
		d.mu.Unlock()
		d.wg.Go(func() {
			defer conn.Close()
			if d.negotiate(conn) == nil {
				_ = d.serve(conn) // its end is the machine's
			}
		})
	}
}

// Numbers of the protocol.
const (
	magicServer  = 0x4e42444d41474943 // NBDMAGIC
	magicOption  = 0x49484156454f5054 // IHAVEOPT
	magicReply   = 0x3e889045565a9
	magicRequest = 0x25609513
	magicSimple  = 0x67446698

	optAbort, optInfo, optGo = 2, 6, 7

	replyAck, replyInfo = 1, 3
	replyUnsupported    = 1<<31 + 1

	flagsExport = 1 | 4 | 8 // there are flags; FLUSH; FUA
	flagFUA     = 1

	cmdRead, cmdWrite, cmdDisc, cmdFlush = 0, 1, 2, 3

	maxRequest = 32 << 20 // bytes, as the protocol has it
)

// negotiate offers the disk, whatever name it is asked for by.
func (d *Disk) negotiate(conn net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, 3) // fixed newstyle, no zeroes
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil { // the client's flags
		return err
	}
	for {
		var head struct {
			Magic       uint64
			Option, Len uint32
		}
		if err := binary.Read(conn, binary.BigEndian, &head); err != nil {
			return err
		}
		if head.Magic != magicOption || head.Len > 4096 {
			return errors.New("not an option")
		}
		if _, err := io.CopyN(io.Discard, conn, int64(head.Len)); err != nil {
			return err
		}
		var err error
		switch head.Option {
		case optGo, optInfo:
			export := binary.BigEndian.AppendUint16(nil, 0) // NBD_INFO_EXPORT
			export = binary.BigEndian.AppendUint64(export, uint64(d.size))
			export = binary.BigEndian.AppendUint16(export, flagsExport)
			if err = optionReply(conn, head.Option, replyInfo, export); err == nil {
				err = optionReply(conn, head.Option, replyAck, nil)
			}
			if err == nil && head.Option == optGo {
				return nil
			}
		case optAbort:
			_ = optionReply(conn, head.Option, replyAck, nil)
			return errors.New("the client went")
		default:
			err = optionReply(conn, head.Option, replyUnsupported, nil)
		}
		if err != nil {
			return err
		}
	}
}

func optionReply(w io.Writer, option, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := w.Write(append(b, data...))
	return err
}

// request is one of the machine's.
type request struct {
	Magic       uint32
	Flags, Type uint16
	Handle      uint64
	Offset      uint64
	Len         uint32
}

// serve does what the machine asks for, one after the other.
func (d *Disk) serve(conn net.Conn) error {
	for {
		var r request
		if err := binary.Read(conn, binary.BigEndian, &r); err != nil {
			return err
		}
		if r.Magic != magicRequest || r.Len > maxRequest || r.Type == cmdDisc {
			return errors.New("the machine went")
		}
		var data []byte
		if r.Type == cmdWrite {
			data = make([]byte, r.Len)
			if _, err := io.ReadFull(conn, data); err != nil {
				return err
			}
		}
		answer, err := d.do(conn, r, data)
		reply := binary.BigEndian.AppendUint32(nil, magicSimple)
		code := uint32(0)
		if err != nil {
			code, answer = 5, nil // EIO
		}
		reply = binary.BigEndian.AppendUint32(reply, code)
		reply = binary.BigEndian.AppendUint64(reply, r.Handle)
		if _, err := conn.Write(append(reply, answer...)); err != nil {
			return err
		}
	}
}

// do does one request of the machine that conn belongs to.
func (d *Disk) do(conn net.Conn, r request, data []byte) (answer []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, count := int64(r.Offset)/sectorSize, int64(r.Len)/sectorSize
	switch {
	case conn != d.conn:
		return nil, errors.New("the power is gone")
	case r.Offset%sectorSize != 0 || r.Len%sectorSize != 0 || int64(r.Offset)+int64(r.Len) > d.size:
		return nil, errors.New("beyond the disk")
	case r.Type == cmdRead:
		answer = make([]byte, r.Len)
		if _, err := d.file.ReadAt(answer, int64(r.Offset)); err != nil {
			return nil, err
		}
		for i := range count {
			if s, ok := d.written[first+i]; ok {
				copy(answer[i*sectorSize:], s[:])
			}
		}
		return answer, nil
	case r.Type == cmdWrite:
		for i := range count {
			d.written[first+i] = [sectorSize]byte(data[i*sectorSize : (i+1)*sectorSize])
		}
		if r.Flags&flagFUA == 0 {
			return nil, nil
		}
		return nil, d.settle(first, count)
	case r.Type == cmdFlush:
		d.flushes++
		for n := range d.written {
			if err := d.settle(n, 1); err != nil {
				return nil, err
			}
		}
		return nil, nil
	}
	return nil, errors.New("not a request that is served")
}

// settle makes sectors safe; mu is held.
func (d *Disk) settle(first, count int64) error {
	for n := first; n < first+count; n++ {
		s, ok := d.written[n]
		if !ok {
			continue
		}
		if _, err := d.file.WriteAt(s[:], n*sectorSize); err != nil {
			return err
		}
		delete(d.written, n)
	}
	return nil
}
