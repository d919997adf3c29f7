package agenttest

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvertnet/culvert/internal/wire"
)

// ServiceName is a name of [Service], where the gateway's Names hold it.
const ServiceName = "web.internal"

// ServiceNames grants [ServiceName] alone.
func ServiceNames() *wire.Names {
	return &wire.Names{
		Servers: []netip.Addr{Overlay}, Exact: []string{ServiceName}, Services: []netip.Prefix{netip.PrefixFrom(Service, Service.BitLen())},
	}
}

// answerNames is the gateway's DNS: it knows [ServiceName] and refuses all others.
func (g *Gateway) answerNames(t *testing.T, wait *sync.WaitGroup) {
	t.Helper()
	socket, err := g.stack.ListenUDP(netip.AddrPortFrom(Overlay, wire.DNSPort))
	if err != nil {
		t.Fatal(err)
	}
	wait.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := socket.ReadFrom(buf)
			if err != nil {
				return
			}
			g.answerName(socket, from, buf[:n])
		}
	})
}

func (g *Gateway) answerName(socket net.PacketConn, to net.Addr, question []byte) {
	var m dnsmessage.Message
	if m.Unpack(question) != nil || len(m.Questions) != 1 {
		return
	}
	m.Response, m.RCode = true, dnsmessage.RCodeRefused
	if strings.EqualFold(m.Questions[0].Name.String(), ServiceName+".") {
		m.RCode = dnsmessage.RCodeSuccess
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: Service.As4()},
		}}
	}
	if b, err := m.Pack(); err == nil {
		_, _ = socket.WriteTo(b, to)
	}
}
