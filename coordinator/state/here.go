package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Where the state is embedded, this process is the only node, and holds every gateway's stream itself: what is asked of one is handed
// over without NATS, which took a tenth of what a join costs. What Serve and Ask promise stays the same.

func (s *Store) serveHere(v *service) (stop func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("serve a gateway: %w", errors.New("the store is closed"))
	}
	s.here[v.instance] = append(s.here[v.instance], v)
	s.serving[v] = struct{}{}
	return v.stop, nil
}

// leaveHere has v take no more calls.
func (v *service) leaveHere() {
	s := v.store
	s.mu.Lock()
	defer s.mu.Unlock()
	rest := slices.DeleteFunc(s.here[v.instance], func(o *service) bool { return o == v })
	if s.here[v.instance] = rest; len(rest) == 0 {
		delete(s.here, v.instance)
	}
}

// find gives the service of a gateway's newest stream, nil where there is none; a call is counted, which the caller ends.
func (s *Store) find(instance string) *service {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.here[instance]
	if len(list) == 0 {
		return nil
	}
	v := list[len(list)-1]
	v.calls.Add(1)
	return v
}

// askHere is Ask; ctx has a deadline.
func (s *Store) askHere(ctx context.Context, instance string, msg []byte) ([]byte, error) {
	v := s.find(instance)
	if v == nil {
		return nil, ErrAway
	}
	ctx, cancel := context.WithCancel(ctx)
	closing := context.AfterFunc(s.life, cancel)
	answered := make(chan []byte, 1)
	go func() {
		defer v.calls.Done()
		defer cancel()
		defer closing()
		select {
		case v.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		defer func() { <-v.slots }()
		answered <- v.handle(ctx, msg)
	}()
	<-ctx.Done() // by the answer as well
	select {
	case answer := <-answered:
		if answer == nil {
			return nil, ErrAway
		}
		return answer, nil
	default:
		return nil, fmt.Errorf("ask a gateway's node: %w", ctx.Err())
	}
}
