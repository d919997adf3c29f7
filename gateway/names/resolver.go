package names

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Bounds of the resolver, whatever upstream says.
const (
	maxAddrs     = 32               // addresses of one name
	maxServices  = 32               // SRV records of one name
	maxChain     = 8                // aliases followed
	minTTL       = time.Second      // so that a name that is asked for all the time costs one query a second
	maxTTL       = 5 * time.Minute  // so that a service that moves is found again
	maxNegative  = 30 * time.Second // so that a name that appears is found soon
	failureTTL   = time.Second      // so that a server in trouble is not asked at every flow
	maxPending   = 1024             // questions that wait for an answer or for their turn
	secondFamily = 50 * time.Millisecond
)

// What a question may come to, besides an answer. Errors of [Resolver] are one of these, wrapped, or a context's.
var (
	ErrNoName  = errors.New("the name does not exist")
	ErrNoData  = errors.New("the name has no address")
	ErrSilent  = errors.New("the resolver does not answer")
	ErrBusy    = errors.New("too many names are being resolved")
	errRefused = errors.New("the resolver answered with an error")
)

// ResolverOptions configure a [Resolver].
type ResolverOptions struct {
	Servers []netip.AddrPort // to ask instead of those in ResolvConf
	// ResolvConf and Hosts are the host's files; they are read again when they change. Default: /etc/resolv.conf, /etc/hosts.
	ResolvConf, Hosts string
	Timeout           time.Duration // of one query to one server; default 2 s
	Attempts          int           // rounds over the servers; default 2
	Concurrent        int           // queries at once; default 256
	CacheSize         int           // answers kept; default 8192
	Logger            *slog.Logger
}

// Validate fills in defaults.
func (o *ResolverOptions) Validate() error {
	if o.Timeout < 0 || o.Attempts < 0 || o.Concurrent < 0 || o.CacheSize < 0 {
		return errors.New("a limit of the resolver cannot be negative")
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.Hosts == "" {
		o.Hosts = "/etc/hosts"
	}
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Second
	}
	if o.Attempts == 0 {
		o.Attempts = 2
	}
	if o.Concurrent == 0 {
		o.Concurrent = 256
	}
	if o.CacheSize == 0 {
		o.CacheSize = 8192
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Resolver resolves names as the gateway's host does: its hosts file first, then the DNS servers of its resolv.conf. Names
// are taken as they are; the search list serves only names of a single label. It keeps answers for their time to live and
// asks one question once, however many flows wait for it.
type Resolver struct {
	opts  ResolverOptions
	hosts *hostsFile
	conf  *confFile
	cache *cache
	slots chan struct{}
	loose chan struct{} // places in slots for names that jobs think of

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu     sync.Mutex
	calls  map[errand]*call
	free   int // of these, for names that jobs think of
	closed bool
	counts Counts
}

// Counts are what a resolver has done since it was made.
type Counts struct {
	Hits     uint64 // answered from memory
	Queries  uint64 // asked of a server
	Failures uint64 // came to nothing: no server answered, or with an error
	Pending  int    // being asked
}

type question struct {
	name  string // canonical
	qtype uint16
}

// errand is a question, and whether a grant spells its name out. Below a wildcard jobs think of names themselves, and may lead them to
// servers that never answer: such questions get half of the places, so that they never keep those for the others waiting.
type errand struct {
	question
	exact bool
}

// call is one question on its way; answer and err are set before done is closed.
type call struct {
	done   chan struct{}
	answer Answer
	err    error
}

// Answer is what is known of one name and type.
type Answer struct {
	Addrs    []netip.Addr // for A and AAAA, over any number of aliases
	Services []*dns.SRV   // for SRV
	Alias    string       // for CNAME: the name's own alias, canonical
	TTL      time.Duration
}

// NewResolver makes a resolver. Closing it ends queries and waits for them.
func NewResolver(opts ResolverOptions) (*Resolver, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	r := &Resolver{
		opts: opts, hosts: newHostsFile(opts.Hosts), conf: newConfFile(opts.ResolvConf),
		cache: newCache(opts.CacheSize), slots: make(chan struct{}, opts.Concurrent),
		loose: make(chan struct{}, max(opts.Concurrent/2, 1)), calls: map[errand]*call{},
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Close ends what is under way and waits.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.work.Wait()
}

// Counts reads the counters.
func (r *Resolver) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.counts
	c.Pending = len(r.calls)
	return c
}

// Addrs gives the addresses of a canonical name, IPv6 first (RFC 8305, section 4), of either family alone where the other
// has none or lets itself be waited for. exact says that a grant spells the name out. The error is ErrNoName or ErrNoData where the name is
// known to have none.
func (r *Resolver) Addrs(ctx context.Context, name string, exact bool) ([]netip.Addr, error) {
	if found := r.hosts.lookup(name); len(found) > 0 {
		return found, nil
	}
	four, six := r.begin(errand{question{name, dns.TypeA}, exact}), r.begin(errand{question{name, dns.TypeAAAA}, exact})
	select {
	case <-four.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var late <-chan time.Time
	if len(four.answer.Addrs) > 0 {
		timer := time.NewTimer(secondFamily)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-six.done:
		if addrs := slices.Concat(six.answer.Addrs, four.answer.Addrs); len(addrs) > 0 {
			return addrs, nil
		}
		return nil, worse(four.err, six.err)
	case <-late:
		return four.answer.Addrs, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// worse picks what to say of two families that both gave nothing: trouble before absence, for it may hide an address.
func worse(a, b error) error {
	for _, err := range []error{a, b} {
		if err != nil && !errors.Is(err, ErrNoName) && !errors.Is(err, ErrNoData) {
			return err
		}
	}
	if errors.Is(a, ErrNoName) {
		return a
	}
	return b
}

// Missing tells whether a name is known not to exist (ErrNoName) or to have no address (ErrNoData), without asking anybody.
func (r *Resolver) Missing(name string) error {
	four, known := r.cache.get(question{name, dns.TypeA}, time.Now())
	if !known || four.err == nil {
		return nil
	}
	six, known := r.cache.get(question{name, dns.TypeAAAA}, time.Now())
	if !known || six.err == nil {
		return nil
	}
	if err := worse(four.err, six.err); errors.Is(err, ErrNoName) || errors.Is(err, ErrNoData) {
		return err
	}
	return nil
}

// Ask asks one question: A, AAAA, SRV or CNAME of a canonical name. exact is as in [Resolver.Addrs].
func (r *Resolver) Ask(ctx context.Context, name string, qtype uint16, exact bool) (Answer, error) {
	c := r.begin(errand{question{name, qtype}, exact})
	select {
	case <-c.done:
		return c.answer, c.err
	case <-ctx.Done():
		return Answer{}, ctx.Err()
	}
}

// decided is the channel of calls that need no asking.
var decided = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// begin joins the call that asks a question already, or makes one.
func (r *Resolver) begin(q errand) *call {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, known := r.cache.get(q.question, time.Now()); known {
		r.counts.Hits++
		return &call{done: decided, answer: e.answer, err: e.err}
	}
	if c := r.calls[q]; c != nil {
		return c
	}
	if r.closed || len(r.calls) >= maxPending || !q.exact && r.free >= maxPending/2 {
		return &call{done: decided, err: ErrBusy}
	}
	c := &call{done: make(chan struct{})}
	if r.calls[q] = c; !q.exact {
		r.free++
	}
	r.work.Go(func() { r.run(q, c) })
	return c
}

// run asks the servers and keeps what they say. It outlives who asked, so that the next one finds the answer.
func (r *Resolver) run(q errand, c *call) {
	defer close(c.done)
	keep := failureTTL
	if done, ok := r.place(q.exact); ok {
		c.answer, keep, c.err = r.query(r.ctx, q.question)
		done()
	} else {
		c.err = ErrSilent
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if delete(r.calls, q); !q.exact {
		r.free--
	}
	r.counts.Queries++
	if c.err != nil && !errors.Is(c.err, ErrNoName) && !errors.Is(c.err, ErrNoData) {
		r.counts.Failures++
	}
	r.cache.put(q.question, entry{answer: c.answer, err: c.err, expires: time.Now().Add(keep)})
}

// place waits for a place to ask from; done gives it back. It is refused when the resolver is closed.
func (r *Resolver) place(exact bool) (done func(), ok bool) {
	taken := []chan struct{}{r.slots}
	if !exact {
		taken = []chan struct{}{r.loose, r.slots}
	}
	give := func(n int) {
		for _, places := range taken[:n] {
			<-places
		}
	}
	for i, places := range taken {
		select {
		case places <- struct{}{}:
		case <-r.ctx.Done():
			give(i)
			return nil, false
		}
	}
	return func() { give(len(taken)) }, true
}
