package names

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// resolvedTimeout bounds all that is asked of systemd-resolved.
const resolvedTimeout = 3 * time.Second

// resolved has systemd-resolved ask the gateway for granted names (org.freedesktop.resolve1(5)). What it is told belongs to the
// interface and goes with it.
type resolved struct {
	conn  *dbus.Conn
	index int32
}

func (*resolved) name() string { return "systemd-resolved" }

type (
	resolvedServer struct {
		Family  int32
		Address []byte
	}
	resolvedDomain struct {
		Name    string
		Routing bool // route queries, but do not search
	}
)

// startResolved needs systemd-resolved on the system's bus.
func startResolved(ctx context.Context, opts Options, s *scope, _ func(string) bool) (mechanism, error) {
	link, err := net.InterfaceByName(opts.Interface)
	if err != nil {
		return nil, fmt.Errorf("tell systemd-resolved of %s: %w", opts.Interface, err)
	}
	ctx, cancel := context.WithTimeout(ctx, resolvedTimeout)
	defer cancel()
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, fmt.Errorf("%w: no system bus: %w", errUnsupported, err)
	}
	r := &resolved{conn: conn, index: int32(link.Index)}
	if err := r.tell(ctx, s); err != nil {
		_ = r.close()
		var reply dbus.Error
		if errors.As(err, &reply) && (reply.Name == "org.freedesktop.DBus.Error.ServiceUnknown" || reply.Name == "org.freedesktop.DBus.Error.NameHasNoOwner") {
			return nil, fmt.Errorf("%w: no systemd-resolved: %w", errUnsupported, err)
		}
		return nil, fmt.Errorf("tell systemd-resolved of granted names: %w", err)
	}
	return r, nil
}

func (r *resolved) tell(ctx context.Context, s *scope) error {
	var servers []resolvedServer
	for _, addr := range s.servers {
		family := int32(unix.AF_INET)
		if addr.Is6() {
			family = unix.AF_INET6
		}
		servers = append(servers, resolvedServer{family, addr.AsSlice()})
	}
	var domains []resolvedDomain
	for _, name := range s.domains() {
		domains = append(domains, resolvedDomain{name, true})
	}
	for _, call := range []struct {
		method string
		value  any
	}{
		// First what keeps all other names away from the interface.
		{"SetLinkDefaultRoute", false},
		{"SetLinkDNSOverTLS", "no"},
		{"SetLinkDNSSEC", "no"}, // private names are signed by nobody
		{"SetLinkLLMNR", "no"},
		{"SetLinkMulticastDNS", "no"},
		{"SetLinkDomains", domains},
		{"SetLinkDNS", servers},
	} {
		if err := r.call(ctx, call.method, r.index, call.value); err != nil {
			return fmt.Errorf("%s: %w", call.method, err)
		}
	}
	return r.call(ctx, "FlushCaches") // or "no such name", learnt before, would hold on
}

func (r *resolved) call(ctx context.Context, method string, args ...any) error {
	manager := r.conn.Object("org.freedesktop.resolve1", "/org/freedesktop/resolve1")
	return manager.CallWithContext(ctx, "org.freedesktop.resolve1.Manager."+method, 0, args...).Err
}

// close takes back what was told, for interfaces that live on.
func (r *resolved) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), resolvedTimeout)
	defer cancel()
	_ = r.call(ctx, "RevertLink", r.index) // gone with the interface at the latest
	return r.conn.Close()
}
