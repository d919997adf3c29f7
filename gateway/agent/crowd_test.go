//go:build linux

package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// crowdEnv makes the test's program play the clients and the service of benchmarks, so that the gateway has a process of its own.
const crowdEnv = "CULVERT_TEST_CROWD"

// crowdOrder is what the parent wants next.
type crowdOrder struct {
	Join    *crowdClient  `json:",omitempty"`
	Go      *crowdGo      `json:",omitempty"`
	Light   bool          `json:",omitempty"` // Join's: as one of lights
	Measure time.Duration `json:",omitempty"`
}

// crowdClient is a session for the crowd to play.
type crowdClient struct {
	Private []byte
	Gateway wire.Key
	Inside  netip.Addr // the gateway's address in the tunnel
	Port    uint16
	Addrs   []netip.Addr
}

// crowdGo has sessions from an index up to another begin so many transfers each of a kind: 'd' for down, 'u' for up.
type crowdGo struct {
	From, To, Streams int
	Kind              byte
}

// crowdAnswer is what became of an order.
type crowdAnswer struct {
	Service netip.AddrPort
	Bytes   []int64 // that each session has received or its service has
	Took    time.Duration
	Used    time.Duration // of processor time, meanwhile
	Err     string
}

// crowd is the child process.
type crowd struct {
	service netip.AddrPort
	clients []*job
	lights  *lights // nil where clients are complete
	bytes   [2048]atomic.Int64
}

// crowdMain obeys orders on stdin until it is closed; the process ends with everything in it.
func crowdMain() {
	// Clients have machines of their own: where they share one with the gateway, they must not be what the gateway waits for.
	_ = syscall.Setpriority(syscall.PRIO_PGRP, 0, -10)
	debug.SetGCPercent(10) // while they join: see collectLess
	c := &crowd{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	c.service = netip.MustParseAddrPort(l.Addr().String())
	go c.serve(l)
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(crowdAnswer{Service: c.service})
	for in := json.NewDecoder(bufio.NewReader(os.Stdin)); ; {
		var o crowdOrder
		if in.Decode(&o) != nil {
			os.Exit(0)
		}
		var a crowdAnswer
		if err := c.obey(o, &a); err != nil {
			a.Err = err.Error()
		}
		_ = out.Encode(a)
	}
}

func (c *crowd) obey(o crowdOrder, a *crowdAnswer) error {
	switch {
	case o.Join != nil && o.Light:
		return c.joinLight(o.Join)
	case o.Join != nil:
		return c.join(o.Join)
	case o.Go != nil:
		collectLess()
		var work sync.WaitGroup
		errs := make([]error, (o.Go.To-o.Go.From)*o.Go.Streams)
		began := time.Now()
		for i := range errs {
			work.Go(func() { errs[i] = c.transfer(o.Go.From+i/o.Go.Streams, o.Go.Kind) })
		}
		work.Wait()
		a.Took = time.Since(began)
		return errors.Join(errs...)
	}
	began, used := time.Now(), processorTime()
	before := make([]int64, c.members())
	for i := range before {
		before[i] = c.bytes[i].Load()
	}
	time.Sleep(o.Measure)
	for i := range before {
		a.Bytes = append(a.Bytes, c.bytes[i].Load()-before[i])
	}
	a.Took, a.Used = time.Since(began), processorTime()-used
	return nil
}

// collectLess has garbage collected about once a gigabyte. The clients' ends have gigabytes of buffers that nobody touches, so a share of
// these would be too much for the machine; and with a fixed small share a few clients would spend half of their time collecting, and on
// clearing what wireguard-go's pools have lost by that.
func collectLess() {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	debug.SetGCPercent(int(min(max(100<<30/m.HeapAlloc, 5), 400)))
}

// join brings a session's tunnel up.
func (c *crowd) join(o *crowdClient) error {
	key, err := wire.PrivateKeyFromBytes(o.Private)
	if err != nil {
		return err
	}
	device, err := netstack.New(netstack.Options{Addresses: o.Addrs})
	if err != nil {
		return err
	}
	t, err := tunnel.New(tunnel.Options{Key: key, TUN: device, Window: 128})
	if err != nil {
		return err
	}
	peer, err := t.AddPeer(tunnel.PeerOptions{
		Key: o.Gateway, Session: key.Public().SessionID(), Initiate: true,
		Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), o.Port)}},
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
	})
	if err != nil {
		return err
	}
	c.clients = append(c.clients, &job{device: device, tunnel: t})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return peer.WaitHandshake(ctx)
}

// joinLight is join for a light client.
func (c *crowd) joinLight(o *crowdClient) (err error) {
	if c.lights == nil {
		c.lights, err = newLights(o.Port, func(index int, bytes int64) { c.bytes[index].Add(bytes) })
		if err != nil {
			return err
		}
	}
	_, err = c.lights.join(o)
	return err
}

// members is how many have joined.
func (c *crowd) members() int {
	if c.lights != nil {
		return len(c.lights.all)
	}
	return len(c.clients)
}

// transfer begins one connection over which bytes go without end.
func (c *crowd) transfer(index int, kind byte) error {
	if c.lights != nil {
		return c.transferLight(index, kind)
	}
	conn, err := c.clients[index].dial(c.service)
	if err != nil {
		return err
	}
	var head [5]byte
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(index))
	if _, err := conn.Write(head[:]); err != nil {
		return err
	}
	if kind == 'd' {
		go tally(conn, &c.bytes[index])
	} else {
		go pourInto(conn)
	}
	return nil
}

// transferLight is transfer for a light client; its target throws away what it gets without looking.
func (c *crowd) transferLight(index int, kind byte) error {
	var head [5]byte
	if head[0] = kind; kind == 'u' {
		head[0] = 'x'
	}
	binary.BigEndian.PutUint32(head[1:], uint32(index))
	return c.lights.all[index].dial(c.service, head[:], kind == 'u')
}

// serve is the service in the private network: what it does, the first bytes of a connection say.
func (c *crowd) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			var head [5]byte
			if _, err := io.ReadFull(conn, head[:]); err != nil {
				return
			}
			switch head[0] {
			case 'd':
				pourInto(conn)
			case 'x':
				discard(conn, &c.bytes[binary.BigEndian.Uint32(head[1:])])
			default:
				tally(conn, &c.bytes[binary.BigEndian.Uint32(head[1:])])
			}
		}()
	}
}

var crowdChunk = make([]byte, 128<<10)

func pourInto(w io.Writer) {
	for {
		if _, err := w.Write(crowdChunk); err != nil {
			return
		}
	}
}

func tally(r io.Reader, n *atomic.Int64) {
	buf := make([]byte, 32<<10)
	for {
		got, err := r.Read(buf)
		n.Add(int64(got))
		if err != nil {
			return
		}
	}
}

// discard counts what comes and has the kernel drop it (tcp(7), MSG_TRUNC): a service elsewhere takes nothing of this machine either.
func discard(conn net.Conn, n *atomic.Int64) {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return
	}
	for err == nil {
		err = raw.Read(func(fd uintptr) bool {
			got, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, 0, 1<<20, syscall.MSG_TRUNC|syscall.MSG_DONTWAIT, 0, 0)
			switch {
			case errno == syscall.EAGAIN:
				return false
			case errno != 0 && errno != syscall.EINTR:
				err = errno
			case errno == 0 && got == 0:
				err = io.EOF
			case errno == 0:
				n.Add(int64(got))
			}
			return true
		})
	}
}

// audience is the parent's side of a crowd.
type audience struct {
	tb      testing.TB
	service netip.AddrPort
	in      *json.Encoder
	out     *json.Decoder
	light   bool
}

// gather starts a crowd in a process of its own.
func gather(tb testing.TB) *audience {
	tb.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^$")
	cmd.Env = append(os.Environ(), crowdEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	a := &audience{tb: tb, in: json.NewEncoder(in), out: json.NewDecoder(bufio.NewReader(out))}
	a.service = a.answer().Service
	return a
}

func (a *audience) answer() (got crowdAnswer) {
	a.tb.Helper()
	if err := a.out.Decode(&got); err != nil {
		a.tb.Fatalf("the crowd has gone: %v", err)
	}
	if got.Err != "" {
		a.tb.Fatalf("the crowd: %s", got.Err)
	}
	return got
}

func (a *audience) ask(o crowdOrder) crowdAnswer {
	a.tb.Helper()
	if err := a.in.Encode(o); err != nil {
		a.tb.Fatal(err)
	}
	return a.answer()
}
