//go:build unix

package stage

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// resolver is where the private network's DNS is.
func (s *Stage) resolver() string { return netip.AddrPortFrom(s.Private.Addr(), 53).String() }

// serveNames answers for the stage's names on the service's host.
func (s *Stage) serveNames() error {
	conn, err := s.Private.ListenPacket(s.resolver())
	if err != nil {
		return fmt.Errorf("serve names: %w", err)
	}
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(s.answerName)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ActivateAndServe() // ends when the socket is closed
	}()
	s.onClose(func() {
		conn.Close()
		<-done
	})
	return nil
}

func (s *Stage) answerName(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	switch question := q.Question[0]; {
	case !slices.Contains(s.opts.Names, strings.TrimSuffix(strings.ToLower(question.Name), ".")):
		m.Rcode = dns.RcodeNameError
	case question.Qtype == dns.TypeA:
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: s.Private.Addr().AsSlice(),
		}}
	}
	_ = w.WriteMsg(m) // whoever asked asks again
}
