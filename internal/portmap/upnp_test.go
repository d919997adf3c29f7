package portmap

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// rootDesc is a description as small routers write it. %s: URLBase element, control URL.
const rootDesc = `<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>%s
<device><deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><friendlyName>router</friendlyName>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType>
<serviceList><service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId><SCPDURL>/scpd.xml</SCPDURL><controlURL>%s</controlURL>
<eventSubURL>/event</eventSubURL></service></serviceList></device></deviceList></device></deviceList></device></root>`

func describe(base, control string) string {
	if base != "" {
		base = "<URLBase>" + base + "</URLBase>"
	}
	return fmt.Sprintf(rootDesc, base, control)
}

// igd is a router's UPnP side on loopback.
type igd struct {
	*httptest.Server
	mu        sync.Mutex
	desc      func(w http.ResponseWriter, r *http.Request)
	external  string
	entries   map[string]string // external port → "address:port"
	leases    []string          // what AddPortMapping was asked for
	permanent bool              // refuses leases that end
	answer    func(w http.ResponseWriter, action string) bool
}

func newIGD(t *testing.T) *igd {
	t.Helper()
	g := &igd{external: "203.0.113.7", entries: map[string]string{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /desc.xml", func(w http.ResponseWriter, r *http.Request) {
		if g.desc != nil {
			g.desc(w, r)
			return
		}
		_, _ = io.WriteString(w, describe("", "/ctl"))
	})
	mux.HandleFunc("POST /ctl", g.control)
	g.Server = httptest.NewServer(mux)
	t.Cleanup(g.Close)
	return g
}

func (g *igd) location(t *testing.T) *url.URL {
	t.Helper()
	u, err := url.Parse(g.URL + "/desc.xml")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (g *igd) control(w http.ResponseWriter, r *http.Request) {
	_, action, _ := strings.Cut(strings.Trim(r.Header.Get("SOAPACTION"), `"`), "#")
	var in struct {
		Body struct {
			Action struct {
				NewExternalPort, NewInternalPort, NewInternalClient, NewLeaseDuration, NewProtocol string
			} `xml:",any"`
		}
	}
	if err := xml.NewDecoder(r.Body).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.answer != nil && g.answer(w, action) {
		return
	}
	a := in.Body.Action
	switch action {
	case "GetExternalIPAddress":
		reply(w, action, "<NewExternalIPAddress>"+g.external+"</NewExternalIPAddress>")
	case "GetSpecificPortMappingEntry":
		to, ok := g.entries[a.NewExternalPort]
		if !ok {
			fault(w, upnpNoSuchEntry)
			return
		}
		addr, port, _ := strings.Cut(to, ":")
		reply(w, action, "<NewInternalPort>"+port+"</NewInternalPort><NewInternalClient>"+addr+"</NewInternalClient>")
	case "AddPortMapping":
		g.leases = append(g.leases, a.NewLeaseDuration)
		if g.permanent && a.NewLeaseDuration != "0" {
			fault(w, upnpPermanentLeases)
			return
		}
		g.entries[a.NewExternalPort] = a.NewInternalClient + ":" + a.NewInternalPort
		reply(w, action, "")
	case "DeletePortMapping":
		delete(g.entries, a.NewExternalPort)
		reply(w, action, "")
	}
}

func reply(w http.ResponseWriter, action, body string) {
	fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body><u:%sResponse xmlns:u="%s">%s</u:%sResponse></s:Body></s:Envelope>`,
		action, services[1], body, action)
}

func fault(w http.ResponseWriter, code int) {
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body><s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail><UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>%d</errorCode><errorDescription>no</errorDescription></UPnPError></detail></s:Fault></s:Body></s:Envelope>`, code)
}

func (g *igd) open(t *testing.T) (*upnp, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return openUPnP(ctx, routerClient(loopback), g.location(t), loopback)
}

var upnpRequest = request{self: selfAddr, port: 51820, lifetime: 20 * time.Minute}

func TestUPnPMapsVerifiesAndRemoves(t *testing.T) {
	g := newIGD(t)
	u, err := g.open(t)
	if err != nil {
		t.Fatal(err)
	}
	m, err := u.add(t.Context(), upnpRequest)
	if err != nil || m.external.String() != "203.0.113.7:51820" || m.lifetime != 20*time.Minute || g.leases[0] != "1200" {
		t.Fatalf("got %v, %v, asked for %v", m, err, g.leases)
	}
	if again, err := u.verify(t.Context(), upnpRequest, m); err != nil || again != m {
		t.Errorf("verifying gives %v, %v", again, err)
	}
	g.external = "203.0.113.8"
	if again, err := u.verify(t.Context(), upnpRequest, m); err != nil || again.external.String() != "203.0.113.8:51820" {
		t.Errorf("verifying after a new address gives %v, %v", again, err)
	}
	g.entries["51820"] = "192.168.1.99:51820"
	if again, err := u.verify(t.Context(), upnpRequest, m); err == nil {
		t.Errorf("verifying another's mapping gives %v", again)
	}
	if err := u.remove(t.Context(), upnpRequest, m); err != nil || len(g.entries) != 1 {
		t.Errorf("removed another's mapping (%v)", err)
	}
	g.entries["51820"] = "192.168.1.10:51820"
	if err := u.remove(t.Context(), upnpRequest, m); err != nil || len(g.entries) != 0 {
		t.Errorf("still there: %v, %v", g.entries, err)
	}
	if _, err := u.verify(t.Context(), upnpRequest, m); err == nil {
		t.Error("verifies what is gone")
	}
}

func TestUPnPLeavesOthersAlone(t *testing.T) {
	g := newIGD(t)
	g.entries["51820"], g.entries["50000"] = "192.168.1.99:1", "192.168.1.10:53"
	u, err := g.open(t)
	if err != nil {
		t.Fatal(err)
	}
	ports := []uint16{50000, 50001}
	u.dice = func() uint16 { p := ports[0]; ports = ports[1:]; return p }
	m, err := u.add(t.Context(), upnpRequest)
	if err != nil || m.external.Port() != 50001 || g.entries["51820"] != "192.168.1.99:1" || g.entries["50000"] != "192.168.1.10:53" {
		t.Errorf("got %v, %v with %v", m, err, g.entries)
	}
	u.dice = func() uint16 { return 51820 }
	delete(g.entries, "50001")
	if m, err := u.add(t.Context(), upnpRequest); err == nil {
		t.Errorf("got %v where every port is taken", m)
	}
}

func TestUPnPWithPermanentLeases(t *testing.T) {
	g := newIGD(t)
	g.permanent = true
	u, err := g.open(t)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := u.add(t.Context(), upnpRequest); err != nil || m.lifetime != 0 || len(g.leases) != 2 || g.leases[1] != "0" {
		t.Errorf("got %v, %v, asked for %v", m, err, g.leases)
	}
}

// victim is a server that nobody may be sent to.
func victim(t *testing.T) (at string, hits *atomic.Int32) {
	t.Helper()
	hits = &atomic.Int32{}
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Skipf("no second loopback address here: %v", err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		hits.Add(1)
		_, _ = io.WriteString(w, describe("", "/ctl"))
	})}}
	s.Start()
	t.Cleanup(s.Close)
	return s.URL, hits
}

// A router cannot make us ask anybody else anything.
func TestUPnPSpeaksToTheRouterAlone(t *testing.T) {
	elsewhere, hits := victim(t)
	for name, desc := range map[string]func(w http.ResponseWriter, r *http.Request){
		"control url":     func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, describe("", elsewhere+"/ctl")) },
		"base":            func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, describe(elsewhere, "/ctl")) },
		"redirect":        func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere, http.StatusFound) },
		"redirect within": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/desc.xml?again", http.StatusFound) },
		"a name": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, describe("http://localhost"+elsewhere[strings.LastIndex(elsewhere, ":"):], "/ctl"))
		},
		"another scheme": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, describe("https://127.0.0.1", "/ctl"))
		},
		"a password": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, describe("http://a:b@127.0.0.1", "/ctl"))
		},
		"network path": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, describe("", strings.TrimPrefix(elsewhere, "http:")+"/ctl"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newIGD(t)
			g.desc = desc
			if u, err := g.open(t); err == nil {
				t.Errorf("taken: %v", u.client.EndpointURL)
			}
		})
	}
	g := newIGD(t)
	g.answer = func(w http.ResponseWriter, _ string) bool {
		w.Header().Set("Location", elsewhere)
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	}
	if u, err := g.open(t); err == nil {
		t.Errorf("taken: %v", u.client.EndpointURL)
	}
	there, err := url.Parse(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	// Also where all checks before it are passed by.
	if _, err := fetchDescription(t.Context(), routerClient(loopback), there); err == nil {
		t.Error("the client speaks to another address")
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d requests went elsewhere", n)
	}
}

// What a router says is cut off, and what is not understood is refused.
func TestUPnPBoundsTheRouter(t *testing.T) {
	var sent atomic.Int64
	for name, desc := range map[string]func(w http.ResponseWriter, r *http.Request){
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "<root>")
			for chunk := strings.Repeat("<a></a>", 4096); ; {
				n, err := io.WriteString(w, chunk)
				sent.Add(int64(n))
				if err != nil {
					return
				}
			}
		},
		"deep": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("<device>", 1<<15))
		},
		"empty":     func(http.ResponseWriter, *http.Request) {},
		"a failure": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, describe("", "/ctl"), http.StatusTeapot) },
		"a long header": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			_, _ = io.WriteString(w, describe("", "/ctl"))
		},
		"no service": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.ReplaceAll(describe("", "/ctl"), "WANIPConnection", "Layer3Forwarding"))
		},
		"an entity": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `<!DOCTYPE r [<!ENTITY x "y">]>`+strings.Replace(describe("", "&x;"), `<?xml version="1.0"?>`, "", 1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newIGD(t)
			g.desc = desc
			if u, err := g.open(t); err == nil {
				t.Errorf("taken: %v", u.client.EndpointURL)
			}
		})
	}
	if n := sent.Load(); n > 16<<20 {
		t.Errorf("%d bytes were taken", n)
	}
	for name, external := range map[string]string{"a name": "router.example", "nothing": "", "markup": "&lt;a&gt;", "long": strings.Repeat("1", 1<<20)} {
		g := newIGD(t)
		g.external = external
		if u, err := g.open(t); err == nil {
			t.Errorf("%s: taken: %v", name, u.client.EndpointURL)
		}
	}
}

// A router whose line is down still answers: then the manager can say what is wrong.
func TestUPnPWithoutAPublicAddress(t *testing.T) {
	g := newIGD(t)
	g.external = "192.168.0.7"
	u, err := g.open(t)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := u.add(t.Context(), upnpRequest); err != nil || Routable(m.external.Addr()) {
		t.Errorf("got %v, %v", m, err)
	}
}

const ssdpAnswer = "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n" +
	"USN: uuid:1::urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nEXT:\r\nSERVER: Debian UPnP/1.1\r\nLOCATION: %s\r\n\r\n"

func TestReadLocation(t *testing.T) {
	good := fmt.Sprintf(ssdpAnswer, "http://192.168.1.1:5000/rootDesc.xml")
	if u, err := readLocation([]byte(good), routerAddr, routerAddr); err != nil || u.Port() != "5000" {
		t.Errorf("got %v, %v", u, err)
	}
	for name, c := range map[string]struct {
		answer string
		from   string
	}{
		"somebody else":     {good, "192.168.1.66"},
		"nothing":           {"", "192.168.1.1"},
		"no location":       {strings.Replace(good, "LOCATION", "X", 1), "192.168.1.1"},
		"a name":            {fmt.Sprintf(ssdpAnswer, "http://router.example/"), "192.168.1.1"},
		"another host":      {fmt.Sprintf(ssdpAnswer, "http://192.168.1.66:5000/"), "192.168.1.1"},
		"the metadata":      {fmt.Sprintf(ssdpAnswer, "http://169.254.169.254/latest/"), "192.168.1.1"},
		"a disguise":        {fmt.Sprintf(ssdpAnswer, "http://192.168.1.1@192.168.1.66/"), "192.168.1.1"},
		"another scheme":    {fmt.Sprintf(ssdpAnswer, "file:///etc/passwd"), "192.168.1.1"},
		"mapped ipv6":       {fmt.Sprintf(ssdpAnswer, "http://[::ffff:192.168.1.1]/"), "192.168.1.1"},
		"another device":    {strings.ReplaceAll(good, "InternetGatewayDevice", "MediaServer"), "192.168.1.1"},
		"not found":         {strings.Replace(good, "200 OK", "404 No", 1), "192.168.1.1"},
		"our own question":  {string(encodeSearch(searched[0])), "192.168.1.1"},
		"an announcement":   {strings.Replace(good, "HTTP/1.1 200 OK", "NOTIFY * HTTP/1.1", 1), "192.168.1.1"},
		"more than fits":    {good + strings.Repeat("x", maxSSDP), "192.168.1.1"},
		"a control in it":   {fmt.Sprintf(ssdpAnswer, "http://192.168.1.1\x7f/"), "192.168.1.1"},
		"only the location": {"LOCATION: http://192.168.1.1/\r\n\r\n", "192.168.1.1"},
	} {
		if u, err := readLocation([]byte(c.answer), netip.MustParseAddr(c.from), routerAddr); err == nil {
			t.Errorf("%s: taken: %v", name, u)
		}
	}
}

func FuzzReadLocation(f *testing.F) {
	for _, location := range []string{"http://192.168.1.1:5000/rootDesc.xml", "http://router/", "http://192.168.1.1@x/", "//192.168.1.1", "http://[192.168.1.1]/"} {
		f.Add([]byte(fmt.Sprintf(ssdpAnswer, location)))
	}
	f.Add(encodeSearch(searched[1]))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := readLocation(b, routerAddr, routerAddr)
		if err == nil && (u.Hostname() != routerAddr.String() || u.Scheme != "http" || u.User != nil) {
			t.Fatalf("took %q as %v", b, u)
		}
	})
}

func FuzzDescription(f *testing.F) {
	f.Add([]byte(describe("", "/ctl")))
	f.Add([]byte(describe("http://192.168.1.1:80/", "ctl")))
	f.Add([]byte(describe("http://192.168.1.66/", "//192.168.1.66/ctl")))
	f.Add([]byte(describe("", "http://192.168.1.1@192.168.1.66/")))
	location := &url.URL{Scheme: "http", Host: "192.168.1.1:5000", Path: "/rootDesc.xml"}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxAnswer {
			return
		}
		root, err := readDescription(strings.NewReader(string(b)))
		if err != nil {
			return
		}
		controls, err := readControls(root, location, routerAddr)
		if err == nil && (len(controls) == 0 || len(controls) > maxServices) {
			t.Fatalf("%d services", len(controls))
		}
		for _, c := range controls {
			if c.url.Hostname() != routerAddr.String() || c.url.Scheme != "http" {
				t.Fatalf("control at %v", c.url)
			}
		}
	})
}

func TestErrorsOfARouterAreBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := bounded(errors.New(rapid.StringN(0, 500, -1).Draw(t, "text")))
		for _, r := range text {
			if r < ' ' || r == 0x7f {
				t.Fatalf("%q holds a control character", text)
			}
		}
		if len(text) > 200*10 {
			t.Fatalf("%d bytes", len(text))
		}
	})
}
