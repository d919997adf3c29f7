package names

import (
	"container/list"
	"sync"
	"time"
)

// cache keeps answers until they expire; when it is full, the one that was used longest ago goes.
type cache struct {
	size int

	mu    sync.Mutex
	items map[question]*list.Element // of *item
	order list.List                  // most recently used first
}

type entry struct {
	answer  Answer
	err     error
	expires time.Time
}

type item struct {
	question question
	entry    entry
}

func newCache(size int) *cache { return &cache{size: size, items: map[question]*list.Element{}} }

func (c *cache) get(q question, now time.Time) (entry, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.items[q]
	if el == nil {
		return entry{}, false
	}
	it := el.Value.(*item)
	if !now.Before(it.entry.expires) {
		c.order.Remove(el)
		delete(c.items, q)
		return entry{}, false
	}
	c.order.MoveToFront(el)
	return it.entry, true
}

func (c *cache) put(q question, e entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if el := c.items[q]; el != nil {
		el.Value.(*item).entry = e
		c.order.MoveToFront(el)
		return
	}
	if len(c.items) >= c.size {
		oldest := c.order.Back()
		delete(c.items, oldest.Value.(*item).question)
		c.order.Remove(oldest)
	}
	c.items[q] = c.order.PushFront(&item{q, e})
}
