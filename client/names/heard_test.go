package names

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/internal/wire"
)

// inbound is a device that takes packets.
type inbound struct {
	tun.Device
	packets int
}

func (d *inbound) Write(bufs [][]byte, _ int) (int, error) {
	d.packets += len(bufs)
	return len(bufs), nil
}

// fromServer is a datagram from an address and port, behind offset bytes.
func fromServer(offset int, from netip.AddrPort, message []byte) []byte {
	p := make([]byte, offset+20+8, offset+40+8+len(message))
	p[offset], p[offset+9] = 0x45, 17
	copy(p[offset+12:], from.Addr().AsSlice())
	if from.Addr().Is6() {
		p = append(p, make([]byte, 20)...)
		p[offset], p[offset+6], p[offset+9] = 0x60, 17, 0
		copy(p[offset+8:], from.Addr().AsSlice())
	}
	binary.BigEndian.PutUint16(p[len(p)-8:], from.Port())
	return append(p, message...)
}

// told is an answer that gives a name an address.
func told(t testing.TB, name string, addr netip.Addr, edit func(*dnsmessage.Message)) []byte {
	t.Helper()
	n := dnsmessage.MustNewName(name + ".")
	rr := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: n, Class: dnsmessage.ClassINET}, Body: &dnsmessage.AResource{}}
	if addr.Is4() {
		rr.Body = &dnsmessage.AResource{A: addr.As4()}
	} else {
		rr.Body = &dnsmessage.AAAAResource{AAAA: addr.As16()}
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{Response: true},
		Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		Answers:   []dnsmessage.Resource{rr},
	}
	if edit != nil {
		edit(&m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHeard: of all that comes out of the tunnel, the addresses that the gateway's servers give to names under wildcards are remembered,
// and nothing else.
func TestHeard(t *testing.T) {
	_, r := newFakeGateway(t)
	r.Set(grantedNames)
	dev := new(inbound)
	l := r.Listen(dev)
	server := netip.AddrPortFrom(grantedNames.Servers[0], wire.DNSPort)
	service := netip.MustParseAddr("198.19.0.7")
	failed := func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError }
	beside := func(m *dnsmessage.Message) { m.Additionals, m.Answers = m.Answers, nil }
	packets := [][]byte{
		nil, make([]byte, 16), make([]byte, 100),
		fromServer(16, netip.AddrPortFrom(server.Addr(), 54), told(t, "port.svc.corp", service, nil)),
		fromServer(16, netip.MustParseAddrPort("10.20.0.5:53"), told(t, "liar.svc.corp", service, nil)),
		fromServer(16, server, told(t, "elsewhere.example", service, nil)),
		fromServer(16, server, told(t, "db.internal", service, nil)), // a grant spells it out
		fromServer(16, server, told(t, "far.svc.corp", netip.MustParseAddr("10.20.0.5"), nil)),
		fromServer(16, server, told(t, "gone.svc.corp", service, failed)),
		fromServer(16, server, []byte("\x00\x00\x80")),
		fromServer(16, server, told(t, "api.svc.corp", service.Next(), nil)),
		fromServer(16, server, told(t, "API.svc.corp", service, nil)),
		fromServer(16, server, told(t, "beside.svc.corp", service.Prev(), beside)),
	}
	for i := range packets {
		if packets[i] == nil {
			packets[i] = make([]byte, 16)
		}
	}
	if n, err := l.Write(packets, 16); n != len(packets) || err != nil || dev.packets != n {
		t.Errorf("%d packets, %v", n, err)
	}
	want := []wire.NamedAddr{{Name: "api.svc.corp", Addr: service}, {Name: "beside.svc.corp", Addr: service.Prev()}}
	if got := r.Heard(); !slices.Equal(got, want) {
		t.Errorf("heard %v", got)
	}
	r.Set(nil)
	if got := r.Heard(); len(got) != 0 {
		t.Errorf("without a grant: %v", got)
	}
	r.Set(grantedNames)
	for i := range 2 * wire.MaxTakenNames {
		_, _ = l.Write([][]byte{fromServer(0, server, told(t, fmt.Sprintf("n%d.svc.corp", i), service, nil))}, 0)
	}
	got := r.Heard()
	size := 0
	for _, n := range got {
		size += len(n.Name) + heardSize
	}
	if last := fmt.Sprintf("n%d.svc.corp", 2*wire.MaxTakenNames-1); len(got) < 100 || len(got) > wire.MaxTakenNames || size > maxHeard || got[len(got)-1].Name != last {
		t.Errorf("%d names, %d bytes, the last is %v", len(got), size, got[len(got)-1])
	}
	if r.Listen(nil) != nil {
		t.Error("no device has become one")
	}
}

// FuzzHear feeds the client whatever may come out of a tunnel.
func FuzzHear(f *testing.F) {
	server := netip.AddrPortFrom(grantedNames.Servers[0], wire.DNSPort)
	service := netip.MustParseAddr("198.19.0.7")
	f.Add(fromServer(0, server, told(f, "api.svc.corp", service, nil)))
	f.Add(fromServer(0, server, told(f, "api.svc.corp", service, func(m *dnsmessage.Message) { m.Additionals = m.Answers })))
	f.Add(fromServer(0, netip.MustParseAddrPort("[fd00::1]:53"), told(f, "api.svc.corp", service, nil)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, packet []byte) {
		r := NewResolver(nil)
		r.Set(grantedNames)
		_, _ = r.Listen(new(inbound)).Write([][]byte{packet}, 0)
		for _, n := range r.Heard() {
			if !r.Covers(n.Name) || !r.scope.believable(n.Addr) {
				t.Fatalf("believed %v", n)
			}
		}
	})
}
