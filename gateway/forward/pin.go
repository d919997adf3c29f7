package forward

// pin is what a [window] knows of where the job has to stop sending.
type pin struct {
	on   bool  // reading does not let the job send more
	ever bool  // it has been on: the stack does not let the receive buffer grow by itself any more
	edge int64 // up to where the job may send at most, in bytes of the flow
	size int64 // the receive buffer before
	loan int64 // what the flow's turn takes beyond that
}

// mark notes what the stack has promised the job by now: at any time half of the buffer, beyond what has been read. mu is held.
func (w *window) mark() {
	if !w.pinned.on {
		w.pinned.edge = max(w.pinned.edge, w.repayAt, w.read+w.ep.SocketOptions().GetReceiveBufferSize()/windowPart)
	}
}

// promised is how much of what has not been read the job may have sent, or still send, at most.
func (w *window) promised() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mark()
	return w.pinned.edge - w.read
}

// holds reports that the receive buffer has room for all that is promised: it may have been larger.
func (w *window) holds() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mark()
	return w.pinned.on || w.pinned.edge-w.read <= w.ep.SocketOptions().GetReceiveBufferSize()/windowPart
}

// isPinned reports that reading does not let the job send more.
func (w *window) isPinned() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pinned.on
}

// pin has the job's window end where it does however much is read: a stack whose receive buffer is that small promises nothing. What is on its
// way beyond the buffer's size would be dropped, so all has to have come but less than a segment.
func (w *window) pin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mark()
	o := w.ep.SocketOptions()
	if !w.pinned.on {
		w.pinned.size = o.GetReceiveBufferSize()
	}
	w.pinned.on, w.pinned.ever = true, true
	o.SetReceiveBufferSize(1, false)
}

// open lets the job send so many bytes, or as many as the flow's buffer is for where the purse has no more, and tells it. What a turn needs beyond
// the flow's own buffer is lent until [window.settle].
func (w *window) open(n, unread int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := &w.pinned
	if w.closed || !p.on {
		return
	}
	if more := windowPart*n - p.size - p.loan; more > 0 && w.purse.take(more, 0) {
		p.loan += more
	}
	size := p.size + p.loan
	p.edge = max(p.edge, w.read+unread+size/windowPart)
	w.ep.SocketOptions().SetReceiveBufferSize(size, true)
}

// settle pays back what a turn was lent. All that has come in it has been read.
func (w *window) settle() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.purse.give(w.pinned.loan)
		w.pinned.loan = 0
	}
}

// unpin has reading let the job send more again. What the last turn was lent is the buffer's from now on.
func (w *window) unpin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := &w.pinned
	if !p.on {
		return
	}
	p.on = false
	w.readLoan += p.loan
	p.size += p.loan
	p.loan = 0
	w.ep.SocketOptions().SetReceiveBufferSize(p.size, true)
}
