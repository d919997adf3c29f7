package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 1 << 20

// jobs joins. Each request has a connection of its own, as those of real jobs have, and is written by hand, so that the
// generator leaves the machine to what it measures.
type jobs struct {
	opts    Options
	targets []target
}

type target struct {
	addr string      // host and port to dial
	host string      // for the Host header
	path string      // before the API's
	tls  *tls.Config // nil: plain HTTP
}

func newJobs(opts Options) (*jobs, error) {
	j := &jobs{opts: opts}
	for _, c := range opts.Coordinators {
		u, err := url.Parse(c)
		if err != nil {
			return nil, err
		}
		t := target{addr: u.Host, host: u.Host, path: trimSlash(u.Path)}
		port := "80"
		if u.Scheme == "https" {
			port = "443"
			t.tls = &tls.Config{MinVersion: tls.VersionTLS12}
			if opts.TLS != nil {
				t.tls = opts.TLS.Clone()
			}
			t.tls.ServerName, t.tls.NextProtos = u.Hostname(), []string{"http/1.1"}
		}
		if u.Port() == "" {
			t.addr = net.JoinHostPort(u.Hostname(), port)
		}
		j.targets = append(j.targets, t)
	}
	return j, nil
}

func trimSlash(s string) string {
	for len(s) > 0 && s[len(s)-1] == '/' {
		s = s[:len(s)-1]
	}
	return s
}

// session is what a job holds.
type session struct {
	id      string
	job     ticket // with the token for the next renewal, where it is signed already
	secret  wire.Secret
	address netip.Addr
	gateway wire.Key
	renewed time.Time // last; from when a lease lasts at least
	lease   time.Duration
}

// join asks the n-th coordinator, counted round, for a session.
func (j *jobs) join(ctx context.Context, n int, t ticket) (*session, error) {
	began := time.Now() // the lease may begin before its answer comes
	body, err := json.Marshal(wire.JoinRequest{Network: j.opts.Network, Key: t.key, Token: t.token, Client: "load", Candidates: []wire.Candidate{
		{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.2:50000")}, {Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("192.0.2.3:50000")},
	}})
	if err != nil {
		return nil, err
	}
	resp, err := j.ask(ctx, n, http.MethodPost, wire.PathSessions, "", body)
	if err != nil {
		return nil, err
	}
	defer resp.close()
	var s *answer
	lines := reading(io.LimitReader(resp.Body, maxAnswer))
	defer putBack(lines)
	for s == nil {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return nil, away(fmt.Errorf("read the answer: %w", err))
		}
		if bytes.HasPrefix(line, []byte(`{"admitted":`)) {
			continue // what it says comes again
		}
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, away(fmt.Errorf("read the answer: %w", err))
		}
		if e.Problem != nil {
			var p problem.Error
			if err := json.Unmarshal(e.Problem, &p); err != nil {
				return nil, err
			}
			return nil, &p
		}
		s = e.Session
	}
	if s.ID != t.key.SessionID() || len(s.Addresses) == 0 || len(s.Gateways) == 0 {
		return nil, problem.New(problem.Incompatible, "the coordinator's answer is not for this job", "run the same version on both sides")
	}
	t.token = ""
	return &session{id: s.ID, job: t, secret: s.Secret, address: s.Addresses[0], gateway: s.Gateways[0].Key, renewed: began, lease: time.Duration(s.Lease)}, nil
}

// event is what is looked at of a [wire.JoinEvent], and answer of a [wire.Session].
type event struct {
	Session *answer         `json:"session"`
	Problem json.RawMessage `json:"problem"`
}

type answer struct {
	ID        string        `json:"id"`
	Secret    wire.Secret   `json:"secret"`
	Addresses []netip.Addr  `json:"addresses"`
	Lease     wire.Duration `json:"lease"`
	Gateways  []struct {
		Key wire.Key `json:"key"`
	} `json:"gateways"`
}

// lease asks how long a session lasts by the coordinator's word.
func (j *jobs) lease(ctx context.Context, n int, s *session) (l wire.Lease, err error) {
	resp, err := j.ask(ctx, n, http.MethodPatch, wire.PathSessions+"/"+s.id, s.secret, []byte("{}"))
	if err != nil {
		return l, err
	}
	defer resp.close()
	err = json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&l)
	return l, err
}

// end ends a session.
func (j *jobs) end(ctx context.Context, n int, s *session) error {
	resp, err := j.ask(ctx, n, http.MethodDelete, wire.PathSessions+"/"+s.id, s.secret, nil)
	if err == nil {
		resp.close()
	}
	return err
}

// response is an answer and the connection that it comes on.
type response struct {
	*http.Response
	close func()
}

// away is what a connection that breaks means to a job: it may try again.
func away(err error) error {
	return problem.Wrap(err, problem.Unreachable, "the coordinator cannot be reached: "+err.Error(), "look at its log")
}

// readers are those of former answers: a thousand a second would make 8 MB of garbage.
var readers = sync.Pool{New: func() any { return bufio.NewReader(nil) }}

func reading(r io.Reader) *bufio.Reader {
	b := readers.Get().(*bufio.Reader)
	b.Reset(r)
	return b
}

func putBack(b *bufio.Reader) {
	b.Reset(nil) // or it would keep its connection
	readers.Put(b)
}

// ask does one request on a connection of its own. A problem document is the error.
func (j *jobs) ask(ctx context.Context, n int, method, path string, bearer wire.Secret, body []byte) (*response, error) {
	t := j.targets[n%len(j.targets)]
	conn, err := t.dial(ctx)
	if err != nil {
		return nil, away(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	var b bytes.Buffer
	// Jobs of many addresses, for a coordinator that trusts this machine as a proxy; else they are all this machine's.
	fmt.Fprintf(&b, "%s %s%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\nX-Forwarded-For: 100.64.%d.%d\r\n",
		method, t.path, path, t.host, len(body), n>>8&0xff, n&0xff)
	if bearer != "" {
		fmt.Fprintf(&b, "Authorization: %s %s\r\n", wire.SchemeBearer, bearer.Reveal())
	}
	if method == http.MethodPost {
		b.WriteString("Accept: " + wire.MediaEvents + "\r\n")
	}
	b.WriteString("\r\n")
	b.Write(body)
	if _, err := conn.Write(b.Bytes()); err != nil {
		stop()
		_ = conn.Close()
		return nil, away(err)
	}
	lines := reading(conn)
	done := func() {
		stop()
		_ = conn.Close()
		putBack(lines)
	}
	resp, err := http.ReadResponse(lines, &http.Request{Method: method})
	if err != nil {
		done()
		return nil, away(errors.Join(err, ctx.Err()))
	}
	if resp.StatusCode >= 300 {
		defer done()
		return nil, problem.Read(resp)
	}
	return &response{resp, done}, nil
}

// dial connects. Connections are reset in the end, or the ports of a machine that plays a thousand jobs a second run out.
func (t *target) dial(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return nil, err
	}
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	if t.tls == nil {
		return conn, nil
	}
	secure := tls.Client(conn, t.tls)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secure, nil
}
