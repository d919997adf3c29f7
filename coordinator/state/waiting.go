package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const lostSubject = "culvert.lost" // what one node misses, all look for

// errNewLeader ends a try that was waiting for an answer of a leader that is no longer one.
var errNewLeader = errors.New("another server leads by now")

// calls are those to one leader.
type calls struct {
	mu       sync.Mutex
	underWay map[*context.CancelCauseFunc]struct{}
	electing chan struct{} // closed when there is a leader; nil: there is one, as far as is known
	told     time.Time     // when all nodes were told last
}

// shut has calls wait, so that none is made in vain and then waits for its next try, until the function that it gives is called.
func (c *calls) shut() (open func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	electing := make(chan struct{})
	c.electing = electing
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.electing = nil
		close(electing)
	}
}

// begin waits until there is a leader, and gives the context of a call.
func (c *calls) begin(ctx context.Context) (call context.Context, end func(), err error) {
	c.mu.Lock()
	for c.electing != nil {
		electing := c.electing
		c.mu.Unlock()
		select {
		case <-electing:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("while a leader is elected: %w", ctx.Err())
		}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	call, cancel := context.WithCancelCause(ctx)
	if c.underWay == nil {
		c.underWay = map[*context.CancelCauseFunc]struct{}{}
	}
	c.underWay[&cancel] = struct{}{}
	return call, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.underWay, &cancel)
		cancel(nil)
	}, nil
}

// release ends what waits for an answer that will not come.
func (c *calls) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for cancel := range c.underWay {
		(*cancel)(errNewLeader)
	}
	clear(c.underWay)
}

// alarm has the leaders looked for, this stream's and, by all nodes, each: a server that is lost may have led several.
func (e *election) alarm(why alarm) {
	e.raise(why)
	e.calls.mu.Lock()
	tell := time.Since(e.calls.told) > slowCall
	if tell {
		e.calls.told = time.Now()
	}
	e.calls.mu.Unlock()
	if tell {
		_ = e.conn.Publish(lostSubject, nil) // an error says that the connection is broken
	}
}

// during makes a call to a leader, once there is one: it raises the alarm where that takes long, again and again, or finds nobody, and ends it with
// errNewLeader where another server leads by now.
func (e *election) during(ctx context.Context, f func(ctx context.Context) error) error {
	if e == nil {
		return f(ctx)
	}
	ctx, end, err := e.calls.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	stop := e.watch(ctx)
	defer stop()
	err = f(ctx)
	switch {
	case err == nil:
	case errors.Is(context.Cause(ctx), errNewLeader):
		return fmt.Errorf("%w: %w", errNewLeader, err)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse):
		e.alarm(callNobody)
	}
	return err
}

// watch raises the alarm whenever a call has taken so long again.
func (e *election) watch(ctx context.Context) (stop func() bool) {
	var mu sync.Mutex
	var timer *time.Timer
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(slowCall, func() {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil {
			e.alarm(callSlow)
			timer.Reset(slowCall)
		}
	})
	return timer.Stop
}
