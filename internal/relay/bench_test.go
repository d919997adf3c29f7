package relay

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/cork"
	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// childVar makes the test binary a relay of its own, so that its processor time can be told from that of both ends.
const childVar = "CULVERT_RELAY_CHILD"

// childAddr is what the child says first.
type childAddr struct {
	UDP netip.AddrPort
	URL string
}

// child is a relay until standard input ends. It answers each line with its counters.
func child() {
	s, err := New(context.Background(), Options{UDP: "127.0.0.1:0", Keys: signers(), Rate: 1 << 40})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s.guard.verify, s.guard.source = 1<<30, 1<<30
	web := httptest.NewUnstartedServer(s)
	web.Listener = cork.Listener(web.Listener)
	web.StartTLS()
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(childAddr{s.Addr(), web.URL})
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		runtime.GC()
		_ = out.Encode(s.Stats())
	}
	_ = s.Close()
	web.Close()
}

// remote is a relay in a process of its own.
type remote struct {
	tb   testing.TB
	addr childAddr
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *json.Decoder
}

func startRemote(tb testing.TB) *remote {
	tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	r := &remote{tb: tb, cmd: exec.Command(exe)}
	r.cmd.Env = append(os.Environ(), childVar+"=1")
	r.cmd.Stderr = os.Stderr
	r.in, _ = r.cmd.StdinPipe()
	out, _ := r.cmd.StdoutPipe()
	r.out = json.NewDecoder(out)
	if err := r.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = r.in.Close(); _ = r.cmd.Wait() })
	if err := r.out.Decode(&r.addr); err != nil {
		tb.Fatal(err)
	}
	return r
}

func (r *remote) stats() (s Stats) {
	_, _ = r.in.Write([]byte("\n"))
	if err := r.out.Decode(&s); err != nil {
		r.tb.Fatal(err)
	}
	return s
}

// cpu is the processor time that the relay has taken.
func (r *remote) cpu() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
	if err != nil {
		r.tb.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * (time.Second / 100)
}

// rss is the relay's resident memory in bytes.
func (r *remote) rss() int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", r.cmd.Process.Pid))
	if err != nil {
		r.tb.Fatal(err)
	}
	pages, _ := strconv.Atoi(strings.Fields(string(b))[1])
	return pages * os.Getpagesize()
}

func (r *remote) stream(tb testing.TB) *streamEnd {
	tb.Helper()
	s, err := Dial(tb.Context(), DialOptions{URL: r.addr.URL, HTTP: insecure(tb)})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return &streamEnd{tb: tb, Stream: s}
}

// insecure is a client that takes the child's certificate.
func insecure(tb testing.TB) *http.Client {
	t := &http.Transport{DialContext: cork.Dialer(nil), TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	tb.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// batchEnd is an end over UDP that sends and receives runs.
type batchEnd struct {
	udpEnd
	batch *udpconn.Conn
	q     *udpconn.Queue
	b     *udpconn.Batch
	relay netip.AddrPort
}

func newBatch(tb testing.TB, relay netip.AddrPort) *batchEnd {
	tb.Helper()
	c, err := udpconn.Listen(tb.Context(), udpconn.Options{Addr: "127.0.0.1:0"})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return &batchEnd{udpEnd: udpEnd{tb: tb}, batch: c, q: c.NewQueue(8), b: c.NewBatch(32), relay: relay}
}

func (e *batchEnd) stun(msg []byte) {
	e.q.Add(msg, len(msg), e.relay, netip.Addr{})
	e.q.Flush()
}

func (e *batchEnd) next() ([]byte, Channel, []byte) {
	if err := e.b.Read(); err != nil {
		e.tb.Fatal(err)
	}
	return e.b.Datagram(0).Data, 0, nil
}

func (e *batchEnd) offer() Offer {
	e.stun(WantRequest(txid()))
	msg, _, _ := e.next()
	o, _ := ParseOffer(msg)
	return o
}

// sender sends one run; receiver reads and gives the bytes of frames that came.
type (
	sender   func(c Channel, run []byte, segment int, packets [][]byte)
	receiver func() (int, error)
)

func (e *batchEnd) send(_ Channel, run []byte, segment int, _ [][]byte) {
	e.q.Add(run, segment, e.relay, netip.Addr{})
	e.q.Flush()
}

func (e *batchEnd) receive() (n int, err error) {
	if err := e.b.Read(); err != nil {
		return 0, err
	}
	for i := range e.b.Len() {
		n += len(e.b.Datagram(i).Data)
	}
	return n, nil
}

func (e *streamEnd) send(c Channel, _ []byte, _ int, packets [][]byte) { e.Send(c, packets) }

func (e *streamEnd) receive() (n int, err error) {
	msg, err := e.Receive()
	if err != nil {
		return 0, err
	}
	b := WalkBlocks(msg)
	for b.Next() {
		n += len(b.Data)
	}
	return n, b.Err
}

// pump sends runs with no more than window bytes under way, b.N of them in all, and reports what came and what it cost.
type pump struct {
	send    func(i int)
	receive receiver
	size    int // bytes of one run
	window  int
}

func (p *pump) run(b *testing.B, r *remote) {
	var got atomic.Int64
	var reader sync.WaitGroup
	more := make(chan struct{}, 1)
	stop := make(chan struct{})
	reader.Go(func() {
		for {
			n, err := p.receive()
			if err != nil {
				return
			}
			got.Add(int64(n))
			select {
			case more <- struct{}{}:
			case <-stop:
				return
			default:
			}
		}
	})
	before, sent, lost := r.cpu(), int64(0), int64(0)
	wait := func(room int64) {
		for sent-lost-got.Load() > room {
			select {
			case <-more:
			case <-time.After(100 * time.Millisecond):
				lost = sent - got.Load()
			}
		}
	}
	start := time.Now()
	for i := 0; b.Loop(); i++ {
		wait(int64(p.window - p.size))
		p.send(i)
		sent += int64(p.size)
	}
	wait(0)
	took, gbit := time.Since(start), float64(got.Load())*8/1e9
	b.ReportMetric(gbit/took.Seconds(), "Gbit/s")
	b.ReportMetric((r.cpu()-before).Seconds()/gbit, "relay-core-s/Gbit")
	b.ReportMetric(100*float64(sent-got.Load())/float64(sent), "%lost")
	close(stop)
}

// BenchmarkForward measures one session, one way, with a relay in a process of its own and both ends in this one.
func BenchmarkForward(b *testing.B) {
	type maker func(tb testing.TB, r *remote) (end, sender, receiver)
	udp := func(tb testing.TB, r *remote) (end, sender, receiver) {
		e := newBatch(tb, r.addr.UDP)
		return e, e.send, e.receive
	}
	web := func(tb testing.TB, r *remote) (end, sender, receiver) {
		e := r.stream(tb)
		return e, e.send, e.receive
	}
	for _, tt := range []struct {
		name     string
		from, to maker
	}{{"UDP", udp, udp}, {"WebSocket", web, web}, {"UDPToWebSocket", udp, web}, {"WebSocketToUDP", web, udp}} {
		b.Run(tt.name, func(b *testing.B) {
			r, session := startRemote(b), newTalk(b)
			from, send, _ := tt.from(b, r)
			to, _, receive := tt.to(b, r)
			mustBind(b, from, session, Client)
			mustBind(b, to, session, Gateway)
			packets := slices.Repeat([][]byte{make([]byte, 1452)}, 44)
			run, segment := frames(session.channel, packets)
			p := &pump{size: len(run), window: 32 * len(run), receive: receive}
			if tt.name != "UDP" {
				p.window = 7 * len(run) // what a queue takes
			}
			p.send = func(int) { send(session.channel, run, segment, packets) }
			p.run(b, r)
		})
	}
}

// crowd is many sessions, whose ends on either side share a few sockets, so that what is measured is the relay and not
// the sender.
type crowd struct {
	clients []*batchEnd
	gateway *batchEnd
	runs    [][]byte // of each session
	segment int
}

const crowdSockets = 16

func newCrowd(b *testing.B, r *remote, sessions, packets int) *crowd {
	c := &crowd{gateway: newBatch(b, r.addr.UDP)}
	offer := c.gateway.offer()
	var offers []Offer
	for range min(sessions, crowdSockets) {
		e := newBatch(b, r.addr.UDP)
		c.clients, offers = append(c.clients, e), append(offers, e.offer())
	}
	holder := key(b, 2)
	bindTo := func(e *batchEnd, s *talk, side Side, o Offer) {
		msg, k := bindMessage(b, s, side, o, nil)
		e.stun(msg)
		if a := answer(b, e, &k); a.Code != 0 {
			b.Fatalf("refused with %d", a.Code)
		}
	}
	for i := range sessions {
		s := newTalk(b)
		s.gateway = holder
		bindTo(c.clients[i%crowdSockets], s, Client, offers[i%crowdSockets])
		bindTo(c.gateway, s, Gateway, offer)
		run, segment := frames(s.channel, slices.Repeat([][]byte{make([]byte, 1452)}, packets))
		c.runs, c.segment = append(c.runs, run), segment
	}
	return c
}

// send sends one run of the i-th session.
func (c *crowd) send(i int) {
	i %= len(c.runs)
	c.clients[i%len(c.clients)].send(0, c.runs[i], c.segment, nil)
}

// BenchmarkSessions compares one session with a thousand, for long and short runs.
func BenchmarkSessions(b *testing.B) {
	for _, packets := range []int{44, 8} {
		for _, sessions := range []int{1, 1000} {
			b.Run(fmt.Sprintf("run=%d/sessions=%d", packets, sessions), func(b *testing.B) {
				r := startRemote(b)
				c := newCrowd(b, r, sessions, packets)
				p := &pump{size: len(c.runs[0]), window: 2 << 20, receive: c.gateway.receive, send: c.send}
				p.run(b, r)
			})
		}
	}
}

// BenchmarkDelay measures how long the relay keeps a packet while a thousand sessions send at a given rate.
func BenchmarkDelay(b *testing.B) {
	for _, gbit := range []float64{1.2, 2.5, 4.5} {
		b.Run(fmt.Sprintf("Gbit=%v", gbit), func(b *testing.B) {
			r := startRemote(b)
			const sessions, packets = 1000, 8
			c := newCrowd(b, r, sessions, packets)
			var delays []time.Duration
			var reader sync.WaitGroup
			reader.Go(func() {
				for c.gateway.b.Read() == nil {
					now := time.Now().UnixNano()
					for i := range c.gateway.b.Len() {
						d := c.gateway.b.Datagram(i)
						delays = append(delays, time.Duration(now-int64(binary.BigEndian.Uint64(d.Data[FrameHeader:]))))
					}
				}
			})
			every := time.Duration(float64(len(c.runs[0])*8) / gbit)
			start, n := time.Now(), 0
			for b.Loop() { // in small bursts, as jobs send; not spinning, which would take a processor from the relay
				for time.Since(start) < time.Duration(n)*every {
					time.Sleep(100 * time.Microsecond)
				}
				binary.BigEndian.PutUint64(c.runs[n%sessions][FrameHeader:], uint64(time.Now().UnixNano()))
				c.send(n)
				n++
			}
			time.Sleep(100 * time.Millisecond)
			_ = c.gateway.batch.Close()
			reader.Wait()
			slices.Sort(delays)
			b.ReportMetric(float64(n*len(c.runs[0])*8)/1e9/time.Since(start).Seconds(), "Gbit/s")
			b.ReportMetric(float64(delays[len(delays)/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(delays[len(delays)*99/100].Microseconds()), "p99-us")
			b.ReportMetric(100*(1-float64(len(delays))/float64(n)), "%lost")
		})
	}
}

// BenchmarkFlood measures how many packets of strangers a relay bears while a session goes on, and what becomes of the
// session's.
func BenchmarkFlood(b *testing.B) {
	r, session := startRemote(b), newTalk(b)
	client, gateway := newUDP(b, r.addr.UDP), newUDP(b, r.addr.UDP)
	mustBind(b, client, session, Client)
	mustBind(b, gateway, session, Gateway)
	s := &scene{stage: &stage{Server: &Server{public: client.offer().Key}}, talk: session, stranger: newUDP(b, r.addr.UDP)}
	junk := junkPackets(b, s)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	e := newBatch(b, r.addr.UDP)
	e.q = e.batch.NewQueue(64)
	flood.Go(func() { // 230,000 a second, if the machine can
		sent, start := 0, time.Now()
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			for due := int(230_000 * time.Since(start).Seconds()); sent < due; sent++ {
				m := junk[sent%len(junk)]
				e.q.Add(m, len(m), e.relay, netip.Addr{})
			}
			e.q.Flush()
		}
	})
	before, busy, start := r.stats(), r.cpu(), time.Now()
	came, delays := 0, []time.Duration(nil)
	n := 0
	for b.Loop() {
		n++
		at := time.Now()
		client.frames(session.channel, []byte("through"))
		if gateway.read(50*time.Millisecond) != nil {
			came++
			delays = append(delays, time.Since(at))
		}
	}
	took, used, after := time.Since(start), r.cpu()-busy, r.stats()
	close(stop)
	flood.Wait()
	handled := func(s Stats) uint64 {
		return s.Junk + s.Unserved + s.Strangers + s.STUN + s.Stale + s.Refused + s.Limited
	}
	slices.Sort(delays)
	b.ReportMetric(float64(handled(after)-handled(before))/took.Seconds(), "junk/s")
	b.ReportMetric(float64(after.Unread-before.Unread)/took.Seconds(), "unread/s")
	b.ReportMetric(used.Seconds()/took.Seconds(), "relay-cores")
	b.ReportMetric(100*float64(n-came)/float64(n), "%lost")
	if len(delays) > 0 {
		b.ReportMetric(float64(delays[len(delays)*99/100].Microseconds()), "p99-us")
	}
}

// BenchmarkIdle measures the memory of an idle session: both sides over UDP; and with the gateway on a WebSocket that all
// share; and with a WebSocket of its own for each client besides.
func BenchmarkIdle(b *testing.B) {
	for name, sessions := range map[string]int{"UDP": 10_000, "GatewayOnWebSocket": 10_000, "BothOnWebSockets": 1000} {
		b.Run(name, func(b *testing.B) {
			r := startRemote(b)
			var gateway end = newBatch(b, r.addr.UDP)
			if name != "UDP" {
				gateway = r.stream(b)
			}
			client, offer := newBatch(b, r.addr.UDP), gateway.offer()
			holder := key(b, 2)
			r.stats()
			before := r.rss()
			for range sessions {
				s := newTalk(b)
				s.gateway = holder
				if name == "BothOnWebSockets" {
					mustBind(b, r.stream(b), s, Client)
				} else {
					mustBind(b, client, s, Client)
				}
				msg, k := bindMessage(b, s, Gateway, offer, nil)
				gateway.stun(msg)
				if a := answer(b, gateway, &k); a.Code != 0 {
					b.Fatalf("refused with %d", a.Code)
				}
			}
			if st := r.stats(); st.Sessions != sessions {
				b.Fatalf("%d sessions", st.Sessions)
			}
			r.stats()
			for b.Loop() {
			}
			b.ReportMetric(float64(r.rss()-before)/float64(sessions), "B/session")
		})
	}
}

// BenchmarkBind measures what binding takes of the relay, with a ticket that it has to verify and one that it knows.
func BenchmarkBind(b *testing.B) {
	s, err := New(b.Context(), Options{Keys: []ed25519.PublicKey{signers()[0]}})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	from := origin{addr: netip.MustParseAddrPort("192.0.2.1:1000")}
	var count counts
	buf := make([]byte, 0, maxAnswer)
	offer := Offer{Nonce: s.nonces.give(from.addr), Key: s.public}
	holder, err := wire.NewPrivateKey()
	if err != nil {
		b.Fatal(err)
	}
	session := &talk{client: holder, id: holder.Public().SessionID()}
	msg, _ := bindMessage(b, session, Client, offer, nil)
	now := time.Now().UnixNano()
	b.Run("known", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.answer(buf, msg, from, now, &count)
		}
	})
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			s.guard = newGuard()
			for i := range s.table.shards {
				s.table.shards[i].m.Store(nil)
			}
			s.table.count.Store(0)
			s.answer(buf, msg, from, now, &count)
		}
	})
	if count.refused.Load()+count.limited.Load()+count.stale.Load() > 0 {
		b.Fatalf("refused %d, limited %d", count.refused.Load(), count.limited.Load())
	}
}

// BenchmarkOffer measures the answer to a request that wants an offer, which anybody may ask for.
func BenchmarkOffer(b *testing.B) {
	s := &Server{nonces: newNonces()}
	from := origin{addr: netip.MustParseAddrPort("192.0.2.1:1000")}
	var count counts
	msg, buf := WantRequest(txid()), make([]byte, 0, maxAnswer)
	b.ReportAllocs()
	for b.Loop() {
		s.answer(buf, msg, from, 0, &count)
	}
}

// BenchmarkFairness measures what fifty calm sessions lose while another one sends small packets as fast as it can.
func BenchmarkFairness(b *testing.B) {
	r, hog := startRemote(b), newTalk(b)
	c := newCrowd(b, r, 50, 1)
	from, to := newBatch(b, r.addr.UDP), newBatch(b, r.addr.UDP)
	mustBind(b, from, hog, Client)
	mustBind(b, to, hog, Gateway)
	from.q = from.batch.NewQueue(64)
	frame := make([]byte, FrameHeader+64)
	PutHeader(frame, hog.channel)
	var got atomic.Int64
	stop, running := make(chan struct{}), sync.WaitGroup{}
	running.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				from.q.Add(frame, len(frame), from.relay, netip.Addr{})
			}
		}
	})
	running.Go(func() {
		for {
			n, err := c.gateway.receive()
			if err != nil {
				return
			}
			got.Add(int64(n / c.segment))
		}
	})
	before, start, n := r.stats(), time.Now(), 0
	for b.Loop() {
		c.send(n)
		if n++; n%50 == 0 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	time.Sleep(100 * time.Millisecond)
	after, took := r.stats(), time.Since(start).Seconds()
	close(stop)
	_ = c.gateway.batch.Close()
	running.Wait()
	b.ReportMetric(100*(1-float64(got.Load())/float64(n)), "%calm-lost")
	b.ReportMetric(float64(after.Packets-before.Packets)/took, "forwarded/s")
	b.ReportMetric(float64(after.OverShare-before.OverShare)/took, "cut/s")
	b.ReportMetric(float64(after.Unread-before.Unread)/took, "unread/s")
}
