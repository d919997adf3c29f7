package load

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/problem"
)

// reachFor is how long a coordinator may take to say that it is there, where [Options.Timeout] is not less.
const reachFor = 5 * time.Second

// reach asks every coordinator whether it is there, before anything is played: gateways and jobs would try again and again. It is an
// error where none is.
func (p *player) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, min(p.opts.Timeout, reachFor))
	defer cancel()
	var away []error
	var fault *problem.Error
	for n, base := range p.opts.Coordinators {
		resp, err := p.jobs.ask(ctx, n, http.MethodGet, "/healthz", "", nil)
		if err == nil {
			resp.close()
			continue
		}
		if fault == nil {
			fault = egress.New(&http.Transport{}).Fault(base, err)
		}
		away = append(away, fmt.Errorf("GET %s/healthz: %w", base, errors.Join(errors.Unwrap(err), context.Cause(ctx))))
		if len(p.opts.Coordinators) > 1 { // of one, the error says it
			p.log.Warn("a coordinator does not answer", "coordinator", base, "err", away[len(away)-1])
		}
	}
	switch {
	case len(away) < len(p.opts.Coordinators):
		return nil
	case fault != nil && fault.Code == problem.Certificate:
		return problem.Wrap(fault, fault.Code, fault.Message, "check the URL; give --ca the certificate of a private authority")
	case fault != nil:
		return fault
	}
	what := "the coordinator does not answer: "
	if len(away) > 1 {
		what = fmt.Sprintf("none of %d coordinators answers: ", len(away))
	}
	return problem.Wrap(errors.Join(away...), problem.Unreachable, what+away[0].Error(), "start it, or give --coordinator the address that it listens on")
}

// interrupted is what is said where somebody ends a run that is still waiting for something: what that was, and why it did not come.
func interrupted(what string, why error) error {
	reason := why.Error()
	if p, ok := errors.AsType[*problem.Error](why); ok {
		reason = p.Message
	}
	return problem.Wrap(why, problem.Cancelled, fmt.Sprintf("interrupted while waiting for %s: %s", what, reason), "see what keeps it away, or wait for longer")
}
