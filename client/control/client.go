package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Client talks to the tunnel of one name.
type Client struct {
	http *http.Client
	name string
}

// NewClient makes a client; nothing is dialled before it is used. It looks for the user's own tunnel first and then for
// one that root started.
func NewClient(name string) (*Client, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, name) },
		DisableKeepAlives: true,
	}
	return &Client{name: name, http: &http.Client{Transport: transport}}, nil
}

// Status reads the tunnel's state. Code not-up where no tunnel of this name runs, and needs-privilege where it serves other
// users; this holds for all calls.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.call(ctx, http.MethodGet, pathStatus, nil, &s)
	return s, err
}

// Check asks the gateway whether "host:port" can be reached.
func (c *Client) Check(ctx context.Context, target string) (wire.ReachResult, error) {
	var r wire.ReachResult
	err := c.call(ctx, http.MethodPost, pathCheck, wire.ReachRequest{Target: target}, &r)
	return r, err
}

// Down ends the tunnel and returns when it is closed.
func (c *Client) Down(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, pathDown, struct{}{}, &struct{}{})
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://culvert"+path, body)
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return problem.Read(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(out); err != nil {
		return problem.Wrap(err, problem.Failed, "the tunnel's process answered with something else than JSON",
			"it may be of another version; end it with `culvert down` and start it again")
	}
	return nil
}

func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errForeign):
		return problem.Wrap(err, problem.NotUp, fmt.Sprintf("another user's process poses as the tunnel named %q", c.name),
			"find out what runs on this machine; culvert does not talk to it")
	case ctx.Err() != nil:
		return problem.Wrap(err, problem.Timeout, "the tunnel's process did not answer in time", "look at its log with --log-file")
	case turnedAway(err) && os.Geteuid() > 0:
		return problem.Wrap(err, problem.NeedsPrivilege, fmt.Sprintf("the tunnel named %q does not serve this user", c.name),
			"run the command with sudo; a tunnel that is started with `sudo -E culvert up` serves the user who called sudo as well")
	default:
		return problem.Wrap(err, problem.NotUp, fmt.Sprintf("no tunnel named %q runs", c.name), "start one with `culvert up`")
	}
}

// turnedAway reports whether a process that we trust took the connection and closed it without a word, as the server does
// with users whom it does not serve. How that shows depends on when it is noticed: an end, a broken pipe, or the HTTP client's
// own word that the server has closed an idle connection.
func turnedAway(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return !ok || op.Op != "dial"
}

// errForeign says that something listens that belongs to a user we do not trust.
var errForeign = errors.New("the control socket belongs to another user")

// dial tries the sockets of every user whose tunnel may be ours and keeps the first that the right user listens on.
func dial(ctx context.Context, name string) (net.Conn, error) {
	trusted := Users()
	var first error
	for _, uid := range trusted {
		conn, err := connect(ctx, name, uid)
		if err == nil {
			var owner int
			if owner, err = peerUID(conn); err == nil && slices.Contains(trusted, owner) {
				return conn, nil
			}
			_ = conn.Close()
			err = errors.Join(errForeign, err)
		}
		if first == nil || errors.Is(err, errForeign) {
			first = err
		}
	}
	return nil, first
}

// connect opens one user's control socket.
func connect(ctx context.Context, name string, uid int) (net.Conn, error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	return d.DialContext(ctx, "unix", address(name, uid))
}

// shutdown lets requests in progress finish.
func shutdown(s *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := s.Shutdown(ctx)
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
