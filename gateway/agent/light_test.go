//go:build linux

package agent

import (
	"context"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// lights are many clients that cost next to nothing beyond what they send and receive: one socket, one goroutine and one buffer for all, no
// queues, and a TCP that does no more than the benchmark needs. A thousand complete clients in one process take several times as much for a Gbit as one
// does, which a gateway never sees of a thousand machines; with these it shows what the gateway itself takes.
//
// Each has a source address of its own, by which the gateway tells them apart as it does with clients elsewhere.
type lights struct {
	conn  *udpconn.Conn
	to    netip.AddrPort
	count func(index int, bytes int64)

	mu      sync.Mutex // guards what follows, and the clients
	queue   *udpconn.Queue
	clients map[netip.Addr]*light
	all     []*light
	run     []byte // that is sent
	clock   uint32 // milliseconds, for TCP's timestamps
}

// light is one client.
type light struct {
	all    *lights
	index  int
	src    netip.Addr // outside the tunnel
	key    wire.PrivateKey
	peer   wire.Key
	check  []byte // authenticates checks
	name   string
	seq    uint64
	noise  *initiator
	up     chan struct{} // closed when there are keys
	opened chan struct{} // closed when its connection stands

	send, receive cipher.AEAD
	theirs        uint32 // the gateway's index of the session
	counter       uint64
	tcp           lightTCP
}

const lightTick = 250 * time.Millisecond

// newLights opens the socket and serves it until the process ends.
func newLights(port uint16, count func(index int, bytes int64)) (*lights, error) {
	conn, err := udpconn.Listen(context.Background(), udpconn.Options{Network: "udp4", Addr: "0.0.0.0:0", Buffer: 16 << 20})
	if err != nil {
		return nil, err
	}
	l := &lights{
		conn: conn, to: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), count: count,
		queue: conn.NewQueue(64), clients: map[netip.Addr]*light{}, run: make([]byte, 1<<16),
	}
	go l.read()
	go l.tick()
	return l, nil
}

// read takes what comes for all of them.
func (l *lights) read() {
	for batch := l.conn.NewBatch(8); ; {
		if err := batch.Read(); err != nil {
			return
		}
		l.mu.Lock()
		for i := range batch.Len() {
			d := batch.Datagram(i)
			c := l.clients[d.Local]
			for data := d.Data; c != nil && len(data) > 0; {
				n := min(d.Segment, len(data))
				c.take(data[:n])
				data = data[n:]
			}
			if c != nil {
				c.respond()
			}
		}
		l.mu.Unlock()
	}
}

// tick has clients send again what was not answered, and keeps paths alive.
func (l *lights) tick() {
	for n := 0; ; n++ {
		time.Sleep(lightTick)
		l.mu.Lock()
		l.clock += uint32(lightTick / time.Millisecond)
		for i, c := range l.all {
			if (n+i)%32 == 0 {
				c.probe()
			}
			c.tcp.late(c)
		}
		l.mu.Unlock()
	}
}

// join brings a session up.
func (l *lights) join(o *crowdClient) (*light, error) {
	key, err := wire.PrivateKeyFromBytes(o.Private)
	if err != nil {
		return nil, err
	}
	session := key.Public().SessionID()
	secret, err := key.Shared(o.Gateway)
	if err != nil {
		return nil, err
	}
	c := &light{
		all: l, key: key, peer: o.Gateway, name: session + ":" + key.Public().String()[:8],
		up: make(chan struct{}), opened: make(chan struct{}),
	}
	if c.check, err = hkdf.Key(sha256.New, secret, nil, "culvert path check v1 "+session, sha256.Size); err != nil {
		return nil, err
	}
	c.tcp.src = o.Addrs[0]
	l.mu.Lock()
	c.index = len(l.all)
	c.src = netip.AddrFrom4([4]byte{127, 1, byte(c.index >> 8), byte(c.index)})
	c.noise, err = newInitiator(key, o.Gateway, uint32(c.index))
	l.all = append(l.all, c)
	l.clients[c.src] = c
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	for range 50 {
		l.mu.Lock()
		c.probe()
		l.mu.Unlock()
		select {
		case <-c.up:
			return c, nil
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil, errors.New("the gateway does not answer a light client")
}

// dial opens the client's connection; head is what it says first. Unless it only receives, it sends zeros from then on.
func (c *light) dial(service netip.AddrPort, head []byte, sends bool) error {
	c.all.mu.Lock()
	c.tcp.begin(c, service, head, sends)
	c.all.mu.Unlock()
	select {
	case <-c.opened:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("the connection of light client %d does not come about", c.index)
	}
}

// probe sends a check, which nominates the only path, and carries the handshake while there are no keys.
func (c *light) probe() {
	c.seq++
	check := nat.Check{Username: c.name, Nominate: true, Seq: c.seq, MTU: lightMTU}
	_, _ = rand.Read(check.ID[:])
	if c.send == nil {
		check.Handshake = c.noise.message
	}
	if pkt, err := nat.AppendCheck(nil, check, c.check, 0); err == nil {
		c.emit(pkt, len(pkt))
	}
}

// emit sends a run of packets of one size.
func (c *light) emit(run []byte, size int) {
	c.all.queue.Add(run, size, c.all.to, c.src)
	c.all.queue.Flush()
}

// take gets one datagram.
func (c *light) take(pkt []byte) {
	switch {
	case nat.IsSTUN(pkt):
		if _, id, ok := nat.PeekUsername(pkt); ok && nat.VerifyCheck(pkt, c.check) {
			mapped := c.all.to
			if answer, err := nat.AppendCheckResponse(nil, id, mapped, nat.Tally{}, c.check, nat.PeekAsked(pkt).Size); err == nil {
				c.emit(answer, len(answer))
			}
		}
	case len(pkt) == noiseResponse && pkt[0] == 2 && c.send == nil:
		var err error
		if c.send, c.receive, c.theirs, err = c.noise.finish(pkt); err == nil {
			c.seal(nil)
			close(c.up)
		}
	case len(pkt) > 32 && pkt[0] == 4 && c.receive != nil:
		var nonce [chacha20poly1305.NonceSize]byte
		copy(nonce[4:], pkt[8:16])
		if inner, err := c.receive.Open(pkt[16:16], nonce[:], pkt[16:], nil); err == nil {
			c.tcp.take(c, inner)
		}
	}
}

// respond says what a run of packets calls for.
func (c *light) respond() { c.tcp.respond(c) }

// seal encrypts and sends one packet.
func (c *light) seal(packet []byte) {
	n := c.put(0, packet)
	c.emit(c.all.run[:n], n)
}

// put encrypts a packet into the run, at a place, and gives its end.
func (c *light) put(at int, packet []byte) int {
	b := c.all.run[at:]
	b[0], b[1], b[2], b[3] = 4, 0, 0, 0
	binary.LittleEndian.PutUint32(b[4:], c.theirs)
	binary.LittleEndian.PutUint64(b[8:], c.counter)
	var nonce [chacha20poly1305.NonceSize]byte
	binary.LittleEndian.PutUint64(nonce[4:], c.counter)
	c.counter++
	return at + 16 + len(c.send.Seal(b[16:16], nonce[:], packet, nil))
}
