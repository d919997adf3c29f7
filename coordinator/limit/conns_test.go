package limit

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// accepting takes connections from a listener and keeps them open.
func accepting(t *testing.T, b *Listener) <-chan net.Conn {
	t.Helper()
	got := make(chan net.Conn, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := b.Accept()
			if err != nil {
				return
			}
			got <- c
		}
	}()
	t.Cleanup(func() { _ = b.Close(); <-done })
	return got
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// shutOut wants that no connection comes about, or one that is reset at once.
func shutOut(t *testing.T, from string, to net.Addr) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 30 * time.Second}
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("the connection stays open: %v", err)
	}
}

// dialFrom opens a connection from one of loopback's addresses.
func dialFrom(t testing.TB, from string, to net.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 30 * time.Second}
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

func TestConnectionsOfOneAddress(t *testing.T) {
	b := NewListener(listen(t), ConnOptions{Open: 5, OpenAddr: 2})
	got := accepting(t, b)
	first := dialFrom(t, "127.0.0.1", b.Addr())
	held := <-got
	dialFrom(t, "127.0.0.1", b.Addr())
	<-got
	shutOut(t, "127.0.0.1", b.Addr())
	dialFrom(t, "127.0.0.2", b.Addr())
	<-got
	if b.Open() != 3 || b.Refused() != 1 {
		t.Errorf("%d open, %d refused", b.Open(), b.Refused())
	}
	_ = first.Close()
	_ = held.Close()
	_ = held.Close() // counts once
	if b.Open() != 2 {
		t.Errorf("%d open after one was closed", b.Open())
	}
	dialFrom(t, "127.0.0.1", b.Addr())
	<-got
}

func TestConnectionsInAll(t *testing.T) {
	b := NewListener(listen(t), ConnOptions{Open: 2, OpenAddr: 10})
	got := accepting(t, b)
	dialFrom(t, "127.0.0.1", b.Addr())
	dialFrom(t, "127.0.0.2", b.Addr())
	<-got
	c := <-got
	shutOut(t, "127.0.0.3", b.Addr())
	_ = c.Close()
	dialFrom(t, "127.0.0.3", b.Addr())
	<-got
}

func TestTrustedProxiesHoldMore(t *testing.T) {
	b := NewListener(listen(t), ConnOptions{Open: 10, OpenAddr: 1, Trusted: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	got := accepting(t, b)
	for range 3 {
		dialFrom(t, "127.0.0.1", b.Addr())
		<-got
	}
	dialFrom(t, "127.0.0.2", b.Addr())
	c := <-got
	shutOut(t, "127.0.0.2", b.Addr())
	_ = c.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.byAddr) != 0 || b.open != 3 {
		t.Errorf("%d addresses are counted, %d open", len(b.byAddr), b.open)
	}
}

func TestConnectionsOpenedFast(t *testing.T) {
	b := NewListener(listen(t), ConnOptions{Open: 10, OpenAddr: 10})
	source := netip.MustParsePrefix("127.0.0.1/32")
	for range defaultConnBurst + 1000 {
		b.opened.Charge(source)
	}
	accepting(t, b)
	shutOut(t, "127.0.0.1", b.Addr())
}

// TestRate: the configuration says how fast one address may open them.
func TestConnectionRate(t *testing.T) {
	b := NewListener(listen(t), ConnOptions{Rate: 0.01})
	accepted := accepting(t, b)
	dialFrom(t, "127.0.0.1", b.Addr())
	<-accepted
	shutOut(t, "127.0.0.1", b.Addr())
}
