package state

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// maxCalls is how many messages of one gateway are handled at a time; more wait in line.
	maxCalls = 256

	askTimeout = 10 * time.Second // where the caller has set no deadline

	timeoutHeader = "Culvert-Timeout" // how long the asker waits, in milliseconds
	awayHeader    = "Culvert-Away"    // the node that answers has lost the gateway
)

func gatewaySubject(instance string) string { return "culvert.gateway." + token(instance) }

// service is one call of Serve.
type service struct {
	store    *Store
	instance string
	handle   func(ctx context.Context, msg []byte) []byte
	sub      *nats.Subscription // nil where the state is embedded: see here.go
	gone     chan struct{}      // closed once the subscription delivers no more
	slots    chan struct{}      // one for each call in progress
	calls    sync.WaitGroup
	once     sync.Once
}

// Serve takes the messages for a gateway whose stream this node holds. Each is handled in a goroutine of its own, under
// a context that ends when the asker stops waiting or the store closes. A nil answer says that the gateway is lost:
// the asker gets [ErrAway]. stop waits for calls in progress; messages that have arrived by then are still handled.
func (s *Store) Serve(instance string, handle func(ctx context.Context, msg []byte) []byte) (stop func(), err error) {
	v := &service{store: s, instance: instance, handle: handle, gone: make(chan struct{}), slots: make(chan struct{}, maxCalls)}
	if s.embedded != nil {
		return s.serveHere(v)
	}
	if err := v.subscribe(); err != nil {
		return nil, fmt.Errorf("serve a gateway: %w", err)
	}
	// Other nodes may ask as soon as we return, so the server must know of the subscription by then.
	if err := s.conn.FlushTimeout(connectTimeout); err != nil {
		v.stop()
		return nil, fmt.Errorf("serve a gateway: %w", err)
	}
	return v.stop, nil
}

func (v *service) subscribe() (err error) {
	s := v.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.New("the store is closed")
	}
	if v.sub, err = s.conn.Subscribe(gatewaySubject(v.instance), v.take); err != nil {
		return err
	}
	v.sub.SetClosedHandler(func(string) { close(v.gone) })
	s.serving[v] = struct{}{}
	return nil
}

// take starts a call; it waits for a slot, so that a flood queues up in the subscription, which is bounded.
func (v *service) take(msg *nats.Msg) {
	v.slots <- struct{}{}
	v.calls.Go(func() {
		defer func() { <-v.slots }()
		ctx, cancel := context.WithTimeout(v.store.life, timeoutOf(msg))
		defer cancel()
		reply := &nats.Msg{Data: v.handle(ctx, msg.Data)}
		if reply.Data == nil {
			reply.Header = nats.Header{awayHeader: {"1"}}
		}
		if err := msg.RespondMsg(reply); err != nil && ctx.Err() == nil {
			v.store.log.Warn("a gateway's answer was not sent", "err", err)
		}
	})
}

func timeoutOf(msg *nats.Msg) time.Duration {
	ms, err := strconv.ParseUint(msg.Header.Get(timeoutHeader), 10, 31)
	if err != nil {
		return askTimeout
	}
	return time.Duration(ms) * time.Millisecond //nolint:gosec // 31 bits
}

// stop ends the subscription, lets it deliver what has arrived, and waits for the calls.
func (v *service) stop() {
	v.once.Do(func() {
		if v.sub == nil {
			v.leaveHere()
		} else {
			if v.store.conn.Status() != nats.CONNECTED || v.sub.Drain() != nil {
				_ = v.sub.Unsubscribe() // nothing to drain from; an error says that it is gone already
			}
			<-v.gone
		}
		v.calls.Wait()
		v.store.mu.Lock()
		delete(v.store.serving, v)
		v.store.mu.Unlock()
	})
}

// Ask sends a message to the node that holds a gateway's stream and waits for its answer, until ctx ends, or 10 s
// where it has no deadline. ErrAway where no node does, at once.
func (s *Store) Ask(ctx context.Context, instance string, msg []byte) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, askTimeout)
		defer cancel()
	}
	if s.embedded != nil {
		return s.askHere(ctx, instance, msg)
	}
	answer, err := s.request(ctx, instance, msg)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return nil, ErrAway
	case err != nil:
		return nil, fmt.Errorf("ask a gateway's node: %w", err)
	case answer.Header.Get(awayHeader) != "":
		return nil, ErrAway
	}
	return answer.Data, nil
}

// request is one message and its answer; ctx has a deadline. While there is no connection nothing is sent, and it waits for one.
func (s *Store) request(ctx context.Context, instance string, msg []byte) (*nats.Msg, error) {
	deadline, _ := ctx.Deadline()
	for {
		wait := strconv.FormatInt(max(time.Until(deadline).Milliseconds(), 1), 10)
		answer, err := s.conn.RequestMsgWithContext(ctx, &nats.Msg{
			Subject: gatewaySubject(instance), Data: msg, Header: nats.Header{timeoutHeader: {wait}},
		})
		if !errors.Is(err, nats.ErrReconnectBufExceeded) || s.bucket.escape.broken(time.Now()) {
			return answer, err
		}
		select {
		case <-time.After(firstAgain):
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}
