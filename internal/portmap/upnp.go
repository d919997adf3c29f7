package portmap

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"github.com/huin/goupnp"
	"github.com/huin/goupnp/soap"
)

const (
	maxAnswer     = 256 << 10       // bytes of a description or an answer
	maxHeader     = 16 << 10        // bytes of its header
	answerTimeout = 3 * time.Second // for one of them
	maxServices   = 4               // connections to the internet that are looked at
	maxPorts      = 4               // external ports that are tried

	description = "culvert gateway"
)

// The services that map ports, and whose actions are the same. Version 2 comes first: only it is careful with others'
// mappings.
var services = []string{
	"urn:schemas-upnp-org:service:WANIPConnection:2",
	"urn:schemas-upnp-org:service:WANIPConnection:1",
	"urn:schemas-upnp-org:service:WANPPPConnection:1",
}

// UPnP errors (WANIPConnection:2, section 2.5).
const (
	upnpNoSuchEntry     = 714
	upnpPermanentLeases = 725
)

// upnp is a router with a service that maps ports.
type upnp struct {
	client *soap.SOAPClient
	urn    string
	dice   func() uint16 // another external port to try
}

func probeUPnP(ctx context.Context, router, self netip.Addr) (method, error) {
	client := routerClient(router)
	var found *upnp
	var why error
	err := search(ctx, router, self, func(location *url.URL) bool {
		found, why = openUPnP(ctx, client, location, router)
		return found != nil
	})
	if found == nil {
		return nil, errors.Join(err, why)
	}
	return found, nil
}

// routerClient is an HTTP client that speaks to the router alone: no proxy, no redirect, no other address, no name, and
// nothing that is longer than what a router has to say.
func routerClient(router netip.Addr) *http.Client {
	dialer := net.Dialer{Timeout: answerTimeout}
	return &http.Client{
		Timeout:       answerTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: limited{&http.Transport{
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(address)
				if err != nil || to.Addr() != router {
					return nil, fmt.Errorf("%s is not the router", address)
				}
				return dialer.DialContext(ctx, network, address)
			},
			DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
		}},
	}
}

// limited cuts bodies off, for modules that would read whatever comes.
type limited struct{ http.RoundTripper }

// RoundTrip does as the wrapped one does.
func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// openUPnP fetches a description and gives the first of its services that is connected to the internet. Where none is, the
// first that answers at all: its address is then refused with the reason.
func openUPnP(ctx context.Context, client *http.Client, location *url.URL, router netip.Addr) (*upnp, error) {
	root, err := fetchDescription(ctx, client, location)
	if err != nil {
		return nil, err
	}
	controls, err := readControls(root, location, router)
	if err != nil {
		return nil, err
	}
	var offline *upnp
	for _, c := range controls {
		u := &upnp{client: soap.NewSOAPClient(*c.url), urn: c.urn, dice: randomPort}
		u.client.HTTPClient = *client
		addr, e := u.external(ctx)
		if e == nil && Routable(addr) {
			return u, nil
		}
		if e == nil && offline == nil {
			offline = u
		}
		err = e
	}
	if offline == nil {
		return nil, err
	}
	return offline, nil
}

func fetchDescription(ctx context.Context, client *http.Client, location *url.URL) (*goupnp.RootDevice, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, location.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask for the description: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask for the description: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask for the description: %s", resp.Status)
	}
	return readDescription(resp.Body)
}

func readDescription(r io.Reader) (*goupnp.RootDevice, error) {
	root := new(goupnp.RootDevice)
	d := xml.NewDecoder(r)
	d.DefaultSpace = goupnp.DeviceXMLNamespace
	if err := d.Decode(root); err != nil {
		return nil, fmt.Errorf("read the description: %w", err)
	}
	return root, nil
}

// control is where a service takes actions.
type control struct {
	urn string
	url *url.URL
}

// readControls lists the services of a description that map ports, and refuses those that are not on the router.
func readControls(root *goupnp.RootDevice, location *url.URL, router netip.Addr) ([]control, error) {
	base := location
	if root.URLBaseStr != "" {
		var err error
		if base, err = url.Parse(root.URLBaseStr); err != nil {
			return nil, fmt.Errorf("read the description's base: %w", err)
		}
	}
	root.SetURLBase(base)
	var out []control
	err := errors.New("the router has no service that maps ports")
	for _, urn := range services {
		for _, s := range root.Device.FindService(urn) {
			if e := onRouter(&s.ControlURL.URL, router); e != nil {
				err = e
			} else if len(out) < maxServices {
				out = append(out, control{urn, &s.ControlURL.URL})
			}
		}
	}
	if len(out) == 0 {
		return nil, err
	}
	return out, nil
}

func (*upnp) name() string { return "UPnP" }

// act performs one action. in and out are pointers to structs of strings; out may be nil.
func (u *upnp) act(ctx context.Context, action string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if err := u.client.PerformActionCtx(ctx, u.urn, action, in, out); err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	return nil
}

// faultCode is the UPnP error code in an error, 0 if there is none.
func faultCode(err error) int {
	if fault, ok := errors.AsType[*soap.SOAPFaultError](err); ok {
		return fault.Detail.UPnPError.Errorcode
	}
	return 0
}

func (u *upnp) external(ctx context.Context) (netip.Addr, error) {
	var out struct{ NewExternalIPAddress string }
	if err := u.act(ctx, "GetExternalIPAddress", &struct{}{}, &out); err != nil {
		return netip.Addr{}, err
	}
	addr, err := netip.ParseAddr(out.NewExternalIPAddress)
	if err != nil {
		return netip.Addr{}, errors.New("the router's external address is none")
	}
	return addr.Unmap(), nil
}

// entry names a mapping from outside.
type entry struct{ NewRemoteHost, NewExternalPort, NewProtocol string }

func udpEntry(port uint16) *entry {
	return &entry{NewExternalPort: decimal(port), NewProtocol: "UDP"}
}

func decimal[N uint16 | uint32](n N) string { return strconv.FormatUint(uint64(n), 10) }

// owner tells where an external port leads; an invalid address where it leads nowhere.
func (u *upnp) owner(ctx context.Context, port uint16) (netip.AddrPort, error) {
	var out struct{ NewInternalPort, NewInternalClient string }
	if err := u.act(ctx, "GetSpecificPortMappingEntry", udpEntry(port), &out); err != nil {
		if faultCode(err) == upnpNoSuchEntry {
			return netip.AddrPort{}, nil
		}
		return netip.AddrPort{}, err
	}
	addr, err := netip.ParseAddr(out.NewInternalClient)
	number, perr := strconv.ParseUint(out.NewInternalPort, 10, 16)
	if err != nil || perr != nil {
		return netip.AddrPort{}, errors.New("the router does not say where a port leads")
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), nil
}

// add tries the wished port first, then others. A port that leads somewhere else is somebody's, and version 1 of the service
// would take it away from them without a word.
func (u *upnp) add(ctx context.Context, r request) (mapping, error) {
	external, err := u.external(ctx)
	if err != nil {
		return mapping{}, err
	}
	port := r.wish()
	for range maxPorts {
		var lifetime time.Duration
		if lifetime, err = u.addPort(ctx, r, port); err == nil {
			return mapping{external: netip.AddrPortFrom(external, port), lifetime: lifetime}, nil
		}
		if ctx.Err() != nil {
			break
		}
		port = u.dice()
	}
	return mapping{}, err
}

func (u *upnp) addPort(ctx context.Context, r request, port uint16) (time.Duration, error) {
	inside := netip.AddrPortFrom(r.self, r.port)
	if to, err := u.owner(ctx, port); err == nil && to.IsValid() && to != inside {
		return 0, fmt.Errorf("port %d leads to %s already", port, to)
	}
	// In the order of the specification, which some routers rely on.
	in := struct {
		NewRemoteHost, NewExternalPort, NewProtocol, NewInternalPort, NewInternalClient, NewEnabled string
		NewPortMappingDescription, NewLeaseDuration                                                 string
	}{
		NewExternalPort: decimal(port), NewProtocol: "UDP", NewInternalPort: decimal(r.port), NewInternalClient: r.self.String(),
		NewEnabled: "1", NewPortMappingDescription: description, NewLeaseDuration: decimal(seconds(r.lifetime)),
	}
	err := u.act(ctx, "AddPortMapping", &in, nil)
	if faultCode(err) != upnpPermanentLeases {
		return r.lifetime, err
	}
	in.NewLeaseDuration = "0"
	return 0, u.act(ctx, "AddPortMapping", &in, nil)
}

// verify only reads: some routers keep their mappings in flash memory.
func (u *upnp) verify(ctx context.Context, r request, m mapping) (mapping, error) {
	to, err := u.owner(ctx, m.external.Port())
	if err != nil {
		return mapping{}, err
	}
	if to != netip.AddrPortFrom(r.self, r.port) {
		return mapping{}, errors.New("the router has forgotten the mapping")
	}
	external, err := u.external(ctx)
	if err != nil {
		return mapping{}, err
	}
	m.external = netip.AddrPortFrom(external, m.external.Port())
	return m, nil
}

func (u *upnp) remove(ctx context.Context, r request, m mapping) error {
	if to, err := u.owner(ctx, m.external.Port()); err == nil && to != netip.AddrPortFrom(r.self, r.port) {
		return nil // it is not ours any more
	}
	return u.act(ctx, "DeletePortMapping", udpEntry(m.external.Port()), nil)
}

// randomPort gives a port of the dynamic range (RFC 6335, section 6).
func randomPort() uint16 { return uint16(49152 + rand.IntN(65536-49152)) }
