package relay

import (
	"bufio"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A writer's goroutine ends when there is nothing to write, begins again with whatever is put, and not after stop.
func TestWriterRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		o, written := newOutbox(DefaultFlowQueue, DefaultQueue), &atomic.Uint64{}
		far := newSocket(there, bufio.NewReader(there), true)
		var got atomic.Int64
		var reader sync.WaitGroup
		reader.Go(func() {
			for {
				if _, err := far.readMessage(nil); err != nil {
					return
				}
				got.Add(1)
			}
		})
		w := newWriter(o, newSocket(here, bufio.NewReader(here), false), written)
		for round := range int64(3) {
			if !o.asleep.Load() {
				t.Fatal("a writer with nothing to write is awake")
			}
			if o.putPackets(1, [][]byte{make([]byte, 100)}) != 1 {
				t.Fatal("an empty outbox takes nothing")
			}
			synctest.Wait()
			if got.Load() != round+1 || o.asleep.Load() {
				t.Fatalf("%d messages came, asleep %t", got.Load(), o.asleep.Load())
			}
			time.Sleep(2 * writerLinger)
			synctest.Wait()
		}
		time.Sleep(PingInterval) // which wakes it as well
		w.stop()
		w.running.Wait()
		o.putPackets(1, [][]byte{make([]byte, 100)})
		w.running.Wait()
		synctest.Wait()
		if got.Load() != 3 {
			t.Error("a writer that was stopped writes")
		}
		_ = far.close()
		_ = here.Close()
		reader.Wait()
	})
}
