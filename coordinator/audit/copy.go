package audit

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// copyQueue bounds the blocks that wait for a slow reader of the copy.
const copyQueue = 1024

// copier writes stored records to where an operator collects logs. It never holds the log up: what a reader that has
// stalled does not take is left out there, counted, and still in the log.
type copier struct {
	to      io.Writer
	queue   chan []byte
	metrics *Metrics
	log     *slog.Logger
	warned  rate.Sometimes
	wg      sync.WaitGroup
}

func newCopier(to io.Writer, m *Metrics, log *slog.Logger) *copier {
	c := &copier{to: to, metrics: m, log: log, warned: rate.Sometimes{First: 1, Interval: 10 * time.Second}}
	if to != nil {
		c.queue = make(chan []byte, copyQueue)
		c.wg.Go(c.run)
	}
	return c
}

func (c *copier) write(block []byte) {
	if c.to == nil {
		return
	}
	select {
	case c.queue <- block:
	default:
		c.fail("nobody reads it")
	}
}

func (c *copier) fail(why any) {
	c.metrics.uncopied.Inc()
	c.warned.Do(func() {
		c.log.Error("the copy of the audit log leaves records out; the log itself has them", "err", why)
	})
}

func (c *copier) run() {
	for block := range c.queue {
		if _, err := c.to.Write(records(block)); err != nil {
			c.fail(err)
		}
	}
}

// records gives a block without its seal.
func records(block []byte) []byte {
	return block[:bytes.LastIndexByte(block[:len(block)-1], '\n')+1]
}

// closeWait is how long a stalled reader may keep a coordinator from ending.
const closeWait = 2 * time.Second

func (c *copier) close() {
	if c.to == nil {
		return
	}
	close(c.queue)
	done := make(chan struct{})
	go func() { c.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(closeWait):
		c.fail("it is stuck")
	}
}
