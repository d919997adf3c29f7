package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestEstablishedAreReset: what was open when stock was taken is reset; what is opened later, or still being opened, is not.
func TestEstablishedAreReset(t *testing.T) {
	a := netip.MustParseAddr("198.18.0.2")
	d, err := New(Options{Addresses: []netip.Addr{a}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := d.ListenTCP(netip.AddrPortFrom(a, 80))
	if err != nil {
		t.Fatal(err)
	}
	dial := func() net.Conn {
		c, err := d.DialContext(t.Context(), "tcp", netip.AddrPortFrom(a, 80).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	accept := func() net.Conn {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	before := dial()
	accept()
	ctx, cancel := context.WithCancel(t.Context())
	opening := make(chan error, 1)
	go func() { // to nobody: its SYN is asked for again and again
		_, err := d.DialContext(ctx, "tcp", "198.18.0.9:80")
		opening <- err
	}()
	reset := d.Established()
	after := dial()
	served := accept()
	reset()
	_ = before.SetReadDeadline(time.Now().Add(40 * time.Second))
	var timeout net.Error
	if _, err := before.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("a connection that was open: %v", err)
	}
	if _, err := served.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	_ = after.SetReadDeadline(time.Now().Add(40 * time.Second))
	if _, err := after.Read(make([]byte, 1)); err != nil {
		t.Errorf("a later connection: %v", err)
	}
	select {
	case err := <-opening:
		t.Errorf("a connection that was being opened: %v", err)
	default:
	}
	cancel()
	<-opening
}
