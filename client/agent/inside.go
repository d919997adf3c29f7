package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// insideLimit bounds one request to the gateway through the tunnel.
const insideLimit = 15 * time.Second

// errSilent says that the gateway gave no answer at all, so that another way may be tried.
var errSilent = errors.New("the gateway does not answer through the tunnel")

const silentNext = "the tunnel looks for another path or gateway by itself; `culvert status` shows what it is doing"

// post asks the gateway something through the tunnel. Errors are *problem.Error, around [errSilent] where there was no answer.
func (s *session) post(ctx context.Context, path string, in, out any) error {
	return s.ask(ctx, http.MethodPost, path, in, out)
}

// ask is post with any method.
func (s *session) ask(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, insideLimit)
	defer cancel()
	data, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	gw, _ := s.at()
	url := "http://" + netip.AddrPortFrom(gw.Addresses[0], wire.InsidePort).String() + path
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{DialContext: s.agent.link.DialContext, DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return problem.Wrap(errors.Join(errSilent, err), problem.Unreachable, errSilent.Error(), silentNext)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return problem.Read(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, wire.MaxBody)).Decode(out); err != nil {
		return problem.Wrap(errors.Join(errSilent, err), problem.Unreachable, "the gateway's answer broke off", silentNext)
	}
	return nil
}

// renew gets another lease with a fresh token: from the gateway, which judges for itself, or by way of the coordinator where
// the tunnel carries nothing.
func (s *session) renew(ctx context.Context) (wire.Lease, error) {
	a := s.agent
	token, err := s.freshToken(ctx)
	if err != nil {
		return wire.Lease{}, err
	}
	var lease wire.Lease
	if s.keeper.hasPath() {
		err = s.post(ctx, wire.PathRenew, wire.InsideRenew{Token: token}, &lease)
		if !errors.Is(err, errSilent) {
			return lease, err
		}
		a.log.Info("cannot renew through the tunnel, asking the coordinator", "session", s.ID, "err", err)
	}
	return a.api.update(ctx, s.ID, s.Secret, wire.Update{Token: token})
}

// reach asks the gateway to try a target. What it says is shown in the job's log.
func (s *session) reach(ctx context.Context, target string) (r wire.ReachResult, err error) {
	err = s.post(ctx, wire.PathReach, wire.ReachRequest{Target: target}, &r)
	if err == nil && !oneLine(string(r.Verdict)+r.Rule+r.Reason+r.Next) {
		err = problem.New(problem.Incompatible, "the gateway's answer makes no sense", "check that it is of this program's version")
	}
	return r, err
}

// Reached asks the gateway what the session has reached and was denied, and puts it into a status. Without a gateway that answers the
// status stays as it is.
func (a *Agent) Reached(ctx context.Context, st *control.Status) {
	s := a.current()
	if s == nil || !s.keeper.hasPath() {
		return
	}
	var me wire.InsideSession
	if err := s.ask(ctx, http.MethodGet, wire.PathInsideMe, nil, &me); err != nil {
		a.log.Debug("the gateway does not say what was reached", "session", s.ID, "err", err)
		return
	}
	st.Flows, st.More = &me.Flows, me.More
	for _, r := range me.Reached[:min(len(me.Reached), wire.MaxReached)] {
		if oneLine(r.Proto + r.Target + string(r.Verdict) + r.Rule + r.Reason + string(r.Cause)) { // it is shown in the job's summary
			st.Reached = append(st.Reached, r)
		}
	}
}

// Check asks the gateway whether this session can reach "host:port".
func (a *Agent) Check(ctx context.Context, target string) (wire.ReachResult, error) {
	targets, err := a.asked(ctx, target)
	if err != nil {
		return wire.ReachResult{}, err
	}
	s := a.current()
	if s == nil {
		return wire.ReachResult{}, problem.New(problem.NotUp, "the tunnel has no session at present",
			"`culvert status` shows what it is doing")
	}
	var result wire.ReachResult
	for _, addr := range targets {
		if result, err = s.reach(ctx, addr); err != nil {
			return result, err
		}
		if result.Verdict == wire.Reachable {
			break
		}
	}
	result.Target = target
	return result, nil
}

// explain asks the gateway why it reset a connection to an address of "host:port"; nil where it does not say. It speaks of what was asked
// for: the address of a granted name is nobody's but the gateway's.
func (s *session) explain(ctx context.Context, asked string, target netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r, err := s.reach(ctx, s.agent.namely(asked, target))
	if err != nil {
		return nil
	}
	if host, _, err := net.SplitHostPort(asked); err == nil && !s.agent.granted.Covers(host) && asked != target.String() {
		asked += " (" + target.Addr().String() + ")"
	}
	r.Target = asked
	return verdict(r)
}

// namely is what the gateway is asked about for an address of "host:port": a granted name, because only the gateway knows where it leads,
// or else the address.
func (a *Agent) namely(asked string, target netip.AddrPort) string {
	if host, _, err := net.SplitHostPort(asked); err == nil && a.granted.Covers(host) {
		return net.JoinHostPort(host, strconv.Itoa(int(target.Port())))
	}
	return target.String()
}

// verdict turns the gateway's word into an error, nil where there is nothing to complain about.
func verdict(r wire.ReachResult) error {
	because := ""
	if r.Reason != "" {
		because = ": " + r.Reason
	}
	switch r.Verdict {
	case wire.FlowDenied:
		return problem.New(problem.FlowDenied, "the grant does not cover "+r.Target+because,
			cmp.Or(r.Next, "ask for a rule that allows it, or for the address that you mean"))
	case wire.Unreachable:
		return problem.New(problem.FlowUnreachable, r.Target+" is granted, but does not answer behind the gateway"+because,
			"check that it runs and that the gateway may reach it")
	default:
		return nil
	}
}

// explain is session.explain for the proxy.
func (a *Agent) explain(ctx context.Context, asked string, target netip.AddrPort) error {
	if s := a.current(); s != nil {
		return s.explain(ctx, asked, target)
	}
	return nil
}

// dialInside opens a connection through the tunnel for the proxy.
func (a *Agent) dialInside(ctx context.Context, network, address string) (net.Conn, error) {
	l := a.openedLink()
	if l == nil {
		return nil, problem.New(problem.NotUp, "the tunnel is not up yet", "wait for `culvert up` to return")
	}
	return l.DialContext(ctx, network, address)
}

func (a *Agent) current() *session {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.session
}

// isRefused reports a reset in answer to a connect, be it the kernel's word or the network stack's.
func isRefused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) ||
		strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "reset")
}
