package forward

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/wire"
)

// TestHoldWaitsForConnections: while one is open nothing is held; once it is closed, a new one waits, without a word, until the hold
// is over, and is not counted as denied.
func TestHoldWaitsForConnections(t *testing.T) {
	e := newEnv(t, Limits{})
	target := server(t, "tcp4", echo)
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	if n := e.s.HoldIfQuiet(time.Hour); n != 1 || e.s.Connections() != 1 {
		t.Fatalf("%d connections", n)
	}
	again, err := e.dial(target)
	if err != nil {
		t.Fatalf("a second connection beside one that is open: %v", err)
	}
	_ = again.Close()
	_ = c.Close()
	eventually(t, "the connections are over", func() bool { return e.s.Connections() == 0 })
	const hold = 1500 * time.Millisecond // longer than the first retry of a SYN takes
	began := time.Now()
	if n := e.s.HoldIfQuiet(hold); n != 0 {
		t.Fatalf("%d connections", n)
	}
	late, err := e.dial(target)
	if err != nil {
		t.Fatalf("a connection that was held: %v", err)
	}
	defer late.Close()
	if took := time.Since(began); took < hold {
		t.Errorf("it was there after %v, held for %v", took, hold)
	}
	if counts := e.s.Counts(); counts.Denied+counts.Limited != 0 {
		t.Errorf("counted as %+v", counts)
	}
	select {
	case <-e.errors:
		t.Error("the job was told that it was refused")
	default:
	}
}

// TestHoldIsForAllProtocols: neither datagrams nor echo requests begin a flow, and none is answered with an error.
func TestHoldIsForAllProtocols(t *testing.T) {
	e := newEnv(t, Limits{})
	e.s.HoldIfQuiet(time.Hour)
	c, err := e.job.DialContext(t.Context(), "udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	probe := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize))
	probe.SetType(header.ICMPv4Echo)
	if err := e.job.Inject(icmp4Packet(job4, loopback, header.ICMPv4Echo, 0, 1, nil)); err != nil {
		t.Fatal(err)
	}
	served, err := e.job.DialContext(t.Context(), "udp", "198.18.0.1:7") // a packet after them, so that they have been seen
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	_, _ = served.Write([]byte("x"))
	_ = served.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, _ = served.Read(make([]byte, 8))
	if n := e.s.Counts(); n.Open != 0 || n.Denied != 0 {
		t.Errorf("%+v", n)
	}
}

// TestNamedFlowOfAnotherGateway: a job that has come over from another gateway brings the service address that it was given there, and has
// not asked for the name here. Where the grant spells it out, it is good here too. Below a wildcard it is once the client has told of it;
// while that is awaited no word is said.
func TestNamedFlowOfAnotherGateway(t *testing.T) {
	target := server(t, "tcp4", echo)
	first, second := newNamedEnv(t, Limits{}), newNamedEnv(t, Limits{})
	second.up.Set(t, "db.internal", "db.internal. 1 IN A 127.0.0.1")
	for _, n := range []*namedEnv{first, second} {
		n.join("tcp db.internal:*|tcp www.internal:*|tcp *.svc.corp:*|tcp 127.0.0.1:*", own)
	}
	c, err := second.dial(first.at("db.internal", port(t, target)))
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "by name")
	_ = c.Close()
	if c, err := second.dial(first.at("api.svc.corp", port(t, target))); err == nil {
		_ = c.Close()
		t.Error("an address that no name here has")
	}

	second.up.Set(t, "api.svc.corp", "api.svc.corp. 1 IN A 127.0.0.1")
	api := first.at("api.svc.corp", port(t, target))
	addr := netip.MustParseAddrPort(api).Addr()
	second.s.AwaitNames()
	before, packets := second.s.Counts().Denied, second.gateway.Stats().WritePackets
	dialed := make(chan error, 1)
	go func() {
		c, err := second.dial(api)
		if err == nil {
			c.Close()
		}
		dialed <- err
	}()
	eventually(t, "the flow has been asked for", func() bool { return second.gateway.Stats().WritePackets > packets })
	second.s.Restore([]wire.NamedAddr{
		{Name: "db.internal", Addr: addr}, {Name: "elsewhere.example", Addr: addr}, {Name: "far.svc.corp", Addr: loopback}, {Name: "not a name", Addr: addr},
		{Name: "API.svc.corp.", Addr: addr},
	})
	if err := <-dialed; err != nil {
		t.Errorf("after word of its name: %v", err)
	}
	if name, ok := second.s.Book().Name(addr); name != "api.svc.corp" || !ok || second.s.Counts().Denied != before {
		t.Errorf("the address is %q's, and %d flows were turned away", name, second.s.Counts().Denied-before)
	}
	if c, err := second.dial(net.JoinHostPort(addr.Next().String(), port(t, target))); err == nil {
		_ = c.Close()
		t.Error("an address that no name has, when all names are known")
	}
}
