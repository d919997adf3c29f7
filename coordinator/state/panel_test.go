package state

import (
	"context"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// valve is a way to a server, which can be shut: who comes by it is then connected to something that says nothing, as to a server that is frozen.
type valve struct {
	net.Listener
	to       string
	shut     atomic.Bool
	over     atomic.Bool
	accepted atomic.Int32
	copying  sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newValve(t *testing.T, to string) *valve {
	t.Helper()
	v := &valve{Listener: must(net.Listen("tcp", "127.0.0.1:0")), to: to}
	v.copying.Go(v.serve)
	t.Cleanup(func() {
		v.over.Store(true)
		_ = v.Close()
		v.mu.Lock()
		for _, c := range v.conns {
			_ = c.Close()
		}
		v.mu.Unlock()
		v.copying.Wait()
	})
	return v
}

func (v *valve) serve() {
	for {
		in, err := v.Accept()
		if err != nil {
			return
		}
		v.accepted.Add(1)
		out, err := net.Dial("tcp", v.to)
		if err != nil {
			_ = in.Close()
			continue
		}
		v.mu.Lock()
		v.conns = append(v.conns, in, out)
		v.mu.Unlock()
		v.copying.Go(func() { v.copy(in, out) })
		v.copying.Go(func() { v.copy(out, in) })
	}
}

// copy holds back what comes while the valve is shut.
func (v *valve) copy(to io.WriteCloser, from io.Reader) {
	defer to.Close()
	buf := make([]byte, 1<<16)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		for v.shut.Load() && !v.over.Load() {
			time.Sleep(time.Millisecond)
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (v *valve) url() string { return "nats://" + v.Addr().String() }

// systemServer is a server whose clients are users of the system account, and may do anything there.
func systemServer(t *testing.T, name string) *server.Server {
	t.Helper()
	system := server.NewAccount("$SYS") // in no other may clients publish where members of Raft do
	srv := must(server.NewServer(&server.Options{ServerName: name, Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		Accounts: []*server.Account{system}, SystemAccount: "$SYS", Users: []*server.User{{Username: "system", Password: "system", Account: system}}, NoAuthUser: "system"}))
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(10 * time.Second) {
		t.Fatal("the nats server does not start")
	}
	return srv
}

// panelOf is a panel at servers behind valves.
func panelOf(t *testing.T, names ...string) (p *panel, valves []*valve) {
	t.Helper()
	p = &panel{lost: make(chan struct{}, 1)}
	opts := Options{Logger: quiet}
	for _, name := range names {
		v := newValve(t, systemServer(t, name).Addr().String())
		valves = append(valves, v)
		opts.NATS = append(opts.NATS, v.url())
	}
	lost := make(chan struct{}, 1)
	p.lost = lost
	for _, u := range opts.NATS {
		s := &seat{lost: lost}
		if err := s.connect(opts, u); err != nil {
			t.Fatal(err)
		}
		p.seats = append(p.seats, s)
	}
	t.Cleanup(p.close)
	return p, valves
}

// TestServerIsMissed: a server that says nothing any more counts as dead soon, without anybody calling, and lives again when it answers.
func TestServerIsMissed(t *testing.T) {
	p, valves := panelOf(t, "a", "b")
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	running.Go(func() { p.run(ctx) })
	eventually(t, "both live", func() bool { return len(p.living()) == 2 && len(p.dead()) == 0 })
	valves[0].shut.Store(true)
	eventually(t, "the first is missed", func() bool { return p.dead()[peerOf("a")] && !p.dead()[peerOf("b")] })
	<-p.lost
	valves[0].shut.Store(false)
	eventually(t, "it is back", func() bool { return len(p.living()) == 2 })
	valves[1].shut.Store(true)
	eventually(t, "the second is missed", func() bool { return p.dead()[peerOf("b")] })
	<-p.lost
	valves[1].shut.Store(false)
}

// TestGoesToAServerThatLives: a connection that leaves its server, or loses it, goes to one that lives, and not first to one that is known not to, where it would
// wait for a second.
func TestGoesToAServerThatLives(t *testing.T) {
	p, valves := panelOf(t, "a", "b", "c")
	opts := Options{Logger: quiet}
	for _, v := range valves {
		opts.NATS = append(opts.NATS, v.url())
	}
	conn := must(connectBeside(p, opts, nil, make(chan struct{}, 1)))
	defer conn.Close()
	at := func() int {
		for i, name := range []string{"a", "b", "c"} {
			if conn.ConnectedServerName() == name {
				return i
			}
		}
		return -1
	}
	first := at()
	dead := (first + 1) % 3
	valves[dead].shut.Store(true)
	defer valves[dead].shut.Store(false)
	p.seats[dead].note(false)
	dials := valves[dead].accepted.Load()
	for range 6 {
		was := at()
		if err := conn.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is elsewhere", func() bool { return conn.IsConnected() && at() >= 0 && at() != was })
	}
	if n := valves[dead].accepted.Load() - dials; n > 0 {
		t.Errorf("%d times it went to the server that is dead", n)
	}
}

// TestChoice: one that lives is chosen, and not the last; where there is none, none.
func TestChoice(t *testing.T) {
	p := &panel{}
	var pool []nats.Server
	for _, host := range []string{"a:1", "b:1", "c:1"} {
		s := &seat{host: host}
		s.lives.Store(true)
		p.seats = append(p.seats, s)
		pool = append(pool, nats.Server{URL: &url.URL{Scheme: "nats", Host: host}})
	}
	c := &choice{panel: p, last: "a:1"}
	p.seats[1].lives.Store(false)
	if s, wait := c.next(pool, nats.ServerInfo{}); s == nil || s.URL.Host != "c:1" || wait > 0 {
		t.Errorf("%v, after %s", s, wait)
	}
	if s, wait := c.next(pool, nats.ServerInfo{}); s == nil || s.URL.Host != "a:1" || wait <= 0 || wait > reconnectWait {
		t.Errorf("when that is lost as well: %v, after %s", s, wait)
	}
	p.seats[2].lives.Store(false)
	if s, _ := c.next(pool, nats.ServerInfo{}); s != nil {
		t.Errorf("%v, which it has just left", s)
	}
	if s, _ := c.next(pool, nats.ServerInfo{}); s == nil || s.URL.Host != "a:1" {
		t.Errorf("%v, where there is only one", s)
	}
}
