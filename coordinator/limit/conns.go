package limit

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/internal/cork"
)

// What connections are bounded to where nobody says otherwise.
const (
	DefaultConns     = 32768
	DefaultAddrConns = 4096 // of one address
	defaultConnRate  = 200  // new connections a second of one address: a TLS handshake costs us more than it costs a stranger
	defaultConnBurst = 4096 // and how many at once
	connAddresses    = 1 << 16
)

// ConnOptions are the bounds of a [Listener]; zero stands for the default.
type ConnOptions struct {
	Open     int            // connections at once
	OpenAddr int            // of one address
	Rate     float64        // new ones a second of one address, and twenty times as many at once
	Trusted  []netip.Prefix // proxies, which are bounded in all alone
}

// Listener is a listener that bounds connections: how many are open, in all and for each address, and how fast one address opens
// them. What is beyond that is reset before anything is read of it or written to it. Trusted proxies are bounded in all alone.
type Listener struct {
	net.Listener
	max, maxAddr int
	trusted      []netip.Prefix
	opened       *Table[netip.Prefix]
	refused      atomic.Uint64

	mu     sync.Mutex
	open   int
	byAddr map[netip.Prefix]int
}

// NewListener bounds a listener's connections.
func NewListener(l net.Listener, o ConnOptions) *Listener {
	each, burst := rate.Limit(o.Rate), max(int(20*o.Rate), 1)
	if each <= 0 {
		each, burst = defaultConnRate, defaultConnBurst
	}
	return &Listener{Listener: l, max: cmp.Or(o.Open, DefaultConns), maxAddr: cmp.Or(o.OpenAddr, DefaultAddrConns), trusted: o.Trusted,
		opened: New[netip.Prefix](each, burst, connAddresses), byAddr: map[netip.Prefix]int{}}
}

// Accept gives the next connection that is within bounds.
func (b *Listener) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source, ok := b.take(c)
		if ok {
			if tcp, isTCP := c.(*net.TCPConn); isTCP {
				_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true}) // only now: most of a flood is not kept
			}
			return &boundedConn{Conn: cork.New(c), from: b, source: source}, nil
		}
		b.refused.Add(1)
		if tcp, isTCP := c.(*net.TCPConn); isTCP {
			_ = tcp.SetLinger(0) // a reset leaves nothing behind
		}
		_ = c.Close()
	}
}

// take counts a connection in, if it may be. The zero source is counted in all alone.
func (b *Listener) take(c net.Conn) (source netip.Prefix, ok bool) {
	ip := addressOf(c).Unmap()
	proxy := slices.ContainsFunc(b.trusted, func(p netip.Prefix) bool { return p.Contains(ip) })
	if !proxy {
		source = Source(ip)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open >= b.max || !proxy && (b.byAddr[source] >= b.maxAddr || !b.opened.Allow(source)) {
		return source, false
	}
	b.open++
	if !proxy {
		b.byAddr[source]++
	}
	return source, true
}

// addressOf is where a connection comes from, without writing it out first: this is done for every one that a stranger opens.
func addressOf(c net.Conn) netip.Addr {
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr()
	}
	addr, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	return addr.Addr()
}

func (b *Listener) give(source netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open--
	if n, counted := b.byAddr[source]; counted && n > 1 {
		b.byAddr[source] = n - 1
	} else {
		delete(b.byAddr, source)
	}
}

// Open gives the connections that are open.
func (b *Listener) Open() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open
}

// Refused gives how many connections were reset because there were too many, in all or of one address.
func (b *Listener) Refused() uint64 { return b.refused.Load() }

// boundedConn is one of them.
type boundedConn struct {
	net.Conn
	from   *Listener
	source netip.Prefix
	once   sync.Once
}

// Close closes the connection and makes room for another.
func (c *boundedConn) Close() error {
	c.once.Do(func() { c.from.give(c.source) })
	return c.Conn.Close()
}

// NetConn gives the connection below, as [crypto/tls.Conn] does.
func (c *boundedConn) NetConn() net.Conn { return c.Conn }
