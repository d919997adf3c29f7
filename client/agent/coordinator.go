package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxAnswer bounds the answer to a join, in bytes: two sessions with their routes.
const maxAnswer = 2 << 20

// coordinator speaks the coordinator's API. Errors are *problem.Error.
type coordinator struct {
	base  string // URL without a slash at its end
	http  *http.Client
	avoid func(netip.AddrPort) // has an address dialled after all others for a while; nil: nobody listens
}

// noting has a request's connection noted.
func noting(ctx context.Context) (context.Context, *atomic.Pointer[netip.AddrPort]) {
	var at atomic.Pointer[netip.AddrPort]
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if tcp, ok := got.Conn.RemoteAddr().(*net.TCPAddr); ok {
			addr := tcp.AddrPort()
			at.Store(&addr)
		}
	}}), &at
}

// leave sees to it that the next request goes to another address of the coordinator's name, if it has one, where this one's could not serve: it has lost its
// state, or did not answer. Behind a load balancer a new connection may lead elsewhere as well.
func (c *coordinator) leave(ctx context.Context, at *atomic.Pointer[netip.AddrPort], err error) {
	if problem.CodeOf(err) != problem.Unreachable || ctx.Err() != nil {
		return
	}
	if addr := at.Load(); addr != nil && c.avoid != nil {
		c.avoid(*addr)
	}
	c.http.CloseIdleConnections()
}

// info asks what may be known before joining. Its real use is the connection, which the join then finds open: connected
// is called once it is, or with false once it is clear that it will not be.
func (c *coordinator) info(ctx context.Context, connected func(open bool)) (wire.Info, error) {
	var once sync.Once
	defer once.Do(func() { connected(false) })
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { once.Do(func() { connected(true) }) },
	})
	var info wire.Info
	err := c.call(ctx, http.MethodGet, wire.PathInfo, "", nil, &info)
	return info, err
}

// update sends candidates, a fresh token, or both.
func (c *coordinator) update(ctx context.Context, id string, secret wire.Secret, u wire.Update) (wire.Lease, error) {
	var lease wire.Lease
	err := c.call(ctx, http.MethodPatch, wire.PathSessions+"/"+url.PathEscape(id), secret, u, &lease)
	return lease, err
}

// end ends a session.
func (c *coordinator) end(ctx context.Context, id string, secret wire.Secret) error {
	return c.call(ctx, http.MethodDelete, wire.PathSessions+"/"+url.PathEscape(id), secret, nil, nil)
}

// call makes one request. out may be nil, and stays as it is where the answer has no content.
func (c *coordinator) call(ctx context.Context, method, path string, secret wire.Secret, in, out any) error {
	noted, at := noting(ctx)
	err := c.exchange(noted, method, path, secret, in, out)
	c.leave(ctx, at, err)
	return err
}

func (c *coordinator) exchange(ctx context.Context, method, path string, secret wire.Secret, in, out any) error {
	req, err := c.request(ctx, method, path, in)
	if err != nil {
		return err
	}
	if secret != "" {
		req.Header.Set("Authorization", "Bearer "+secret.Reveal())
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.away(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return problem.Read(resp)
	}
	if out == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	body := newAnswer(resp, wire.MaxBody)
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return c.garbled(ctx, body, err)
	}
	return nil
}

func (c *coordinator) request(ctx context.Context, method, path string, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, nil
}

// join asks for a session and calls event for each line of the answer, in order, until the last or the first error.
func (c *coordinator) join(ctx context.Context, j wire.JoinRequest, event func(wire.JoinEvent) error) error {
	noted, at := noting(ctx)
	err := c.ask(noted, j, event)
	c.leave(ctx, at, err)
	return err
}

func (c *coordinator) ask(ctx context.Context, j wire.JoinRequest, event func(wire.JoinEvent) error) error {
	req, err := c.request(ctx, http.MethodPost, wire.PathSessions, j)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", wire.MediaEvents+", application/json;q=0.5")
	resp, err := c.http.Do(req)
	if err != nil {
		return c.away(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return problem.Read(resp)
	}
	body := newAnswer(resp, maxAnswer)
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media != wire.MediaEvents {
		var s wire.Session
		if err := json.NewDecoder(body).Decode(&s); err != nil {
			return c.garbled(ctx, body, err)
		}
		return event(wire.JoinEvent{Session: &s})
	}
	return c.events(ctx, body, event)
}

// events reads the lines of a streamed answer.
func (c *coordinator) events(ctx context.Context, body *answer, event func(wire.JoinEvent) error) error {
	lines := json.NewDecoder(body)
	for {
		var e wire.JoinEvent
		if err := lines.Decode(&e); err != nil {
			return c.garbled(ctx, body, err)
		}
		switch {
		case e.Problem != nil:
			var p problem.Error
			if err := json.Unmarshal(e.Problem, &p); err != nil {
				return c.garbled(ctx, body, err)
			}
			return &p
		case e.Session != nil:
			return event(e)
		case e.Admitted != nil:
			if err := event(e); err != nil {
				return err
			}
		}
	}
}

// garbled explains an answer that broke off or is not what the API says.
func (c *coordinator) garbled(ctx context.Context, body *answer, err error) error {
	if body.failed != nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return c.away(ctx, err)
	}
	return problem.Wrap(err, problem.Incompatible, fmt.Sprintf("%s answered with something that is not Culvert's API", c.base),
		"check that the URL is a Culvert coordinator's and that it is of this program's version")
}

// answer is a bounded body that remembers whether reading it failed, which is the network's fault and not the sender's.
type answer struct {
	r      io.Reader
	failed error
}

func newAnswer(resp *http.Response, limit int64) *answer {
	return &answer{r: io.LimitReader(resp.Body, limit)}
}

// Read reads on.
func (a *answer) Read(p []byte) (int, error) {
	n, err := a.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		a.failed = err
	}
	return n, err
}

// away explains why a request got no answer. A certificate or a name that is wrong will not get better by trying again.
func (c *coordinator) away(ctx context.Context, err error) error {
	if cause, ok := errors.AsType[*problem.Error](context.Cause(ctx)); ok {
		return cause
	}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p // a proxy's word
	}
	if inner := (*url.Error)(nil); errors.As(err, &inner) {
		err = inner.Err // the outer one repeats method and URL
	}
	if t, ok := c.http.Transport.(*egress.Transport); ok {
		if p := t.Fault(c.base, err); p != nil {
			return p
		}
	}
	if proxy := c.proxy(); proxy != nil {
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the coordinator %s does not answer through the proxy %s: %v", c.base, proxy.Host, err),
			"check HTTPS_PROXY, and that the proxy may reach the coordinator")
	}
	return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the coordinator %s does not answer: %v", c.base, err),
		"check the URL, and that this runner may reach it (HTTPS_PROXY is honoured)")
}

// proxy is what stands between us and the coordinator, nil for nothing.
func (c *coordinator) proxy() *url.URL {
	t, ok := c.http.Transport.(*egress.Transport)
	u, err := url.Parse(c.base)
	if !ok || err != nil {
		return nil
	}
	return t.ProxyFor(u)
}
