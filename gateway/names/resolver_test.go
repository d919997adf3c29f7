package names

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/gateway/names/namestest"
)

// resolver is one that asks an upstream, or nobody.
func resolver(t testing.TB, u *namestest.Upstream, change func(*ResolverOptions)) *Resolver {
	t.Helper()
	o := ResolverOptions{Hosts: filepath.Join(t.TempDir(), "none"), ResolvConf: filepath.Join(t.TempDir(), "none"), Timeout: 5 * time.Second}
	if u != nil {
		o.Servers = []netip.AddrPort{u.Addr}
	}
	if change != nil {
		change(&o)
	}
	r, err := NewResolver(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func TestResolve(t *testing.T) {
	u := namestest.New(t)
	u.Set(t, "db.internal", "db.internal. 60 IN A 10.0.0.5", "db.internal. 60 IN A 10.0.0.6", "db.internal. 60 IN AAAA fd00::5")
	u.Set(t, "four.internal", "four.internal. 60 IN A 10.0.0.7")
	u.Set(t, "six.internal", "six.internal. 60 IN AAAA fd00::7")
	u.Set(t, "text.internal", `text.internal. 60 IN TXT "x"`)
	u.Set(t, "www.internal", "www.internal. 60 IN CNAME a.internal.")
	u.Set(t, "a.internal", "a.internal. 60 IN CNAME four.internal.")
	u.Set(t, "loop.internal", "loop.internal. 60 IN CNAME loop2.internal.")
	u.Set(t, "loop2.internal", "loop2.internal. 60 IN CNAME loop.internal.")
	u.Set(t, "gone.internal", "gone.internal. 60 IN CNAME nothing.internal.")
	r := resolver(t, u, nil)
	for name, want := range map[string]string{
		"db.internal":   "[fd00::5 10.0.0.5 10.0.0.6]",
		"four.internal": "[10.0.0.7]",
		"six.internal":  "[fd00::7]",
		"www.internal":  "[10.0.0.7]",
	} {
		if got, err := r.Addrs(t.Context(), name, true); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v; want %s", name, got, err, want)
		}
		if err := r.Missing(name); err != nil {
			t.Errorf("%s is missing: %v", name, err)
		}
	}
	for name, want := range map[string]error{"text.internal": ErrNoData, "nothing.internal": ErrNoName, "loop.internal": errRefused, "gone.internal": ErrNoName} {
		if got, err := r.Addrs(t.Context(), name, true); !errors.Is(err, want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, want)
		}
	}
	if !errors.Is(r.Missing("nothing.internal"), ErrNoName) || !errors.Is(r.Missing("text.internal"), ErrNoData) || r.Missing("never.asked") != nil {
		t.Error("what is missing is not remembered")
	}
}

// What one server leaves of a chain of aliases is asked for.
func TestResolveFollowsAliases(t *testing.T) {
	m := new(dns.Msg)
	m.SetQuestion("a.internal.", dns.TypeA)
	for _, line := range []string{"a.internal. 60 IN CNAME b.internal.", "other.internal. 60 IN A 10.9.9.9", "b.internal. 5 IN CNAME c.internal."} {
		rr, err := dns.NewRR(line)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	found, alias, ttl := read(m, question{"a.internal", dns.TypeA})
	if len(found.Addrs) != 0 || alias != "c.internal" || ttl != 5*time.Second {
		t.Errorf("%+v, %s, %v", found, alias, ttl)
	}
}

func TestResolveTroubles(t *testing.T) {
	u := namestest.New(t)
	u.Set(t, "db.internal", "db.internal. 60 IN A 10.0.0.5")
	u.SetRcode(dns.RcodeServerFailure)
	r := resolver(t, u, nil)
	if _, err := r.Addrs(t.Context(), "db.internal", true); !errors.Is(err, errRefused) {
		t.Errorf("SERVFAIL gives %v", err)
	}
	if r.Missing("db.internal") != nil {
		t.Error("trouble is taken for absence")
	}
	if c := r.Counts(); c.Failures == 0 || c.Pending != 0 {
		t.Errorf("counts %+v", c)
	}
	u.SetRcode(0)
	u.SetTruncate(true)
	r = resolver(t, u, nil)
	if got, err := r.Addrs(t.Context(), "db.internal", true); err != nil || fmt.Sprint(got) != "[10.0.0.5]" {
		t.Errorf("over TCP: %v, %v", got, err)
	}
	u.SetTruncate(false)
	u.SetSilent(true)
	r = resolver(t, u, func(o *ResolverOptions) { o.Timeout, o.Attempts = 20*time.Millisecond, 1 })
	if _, err := r.Addrs(t.Context(), "db.internal", true); !errors.Is(err, ErrSilent) {
		t.Errorf("silence gives %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r = resolver(t, u, nil)
	if _, err := r.Addrs(ctx, "db.internal", true); !errors.Is(err, context.Canceled) {
		t.Errorf("who has gone waits: %v", err)
	}
}

// TestAnswersAreHeldAgainstTheQuestion: what answers another question, or is none, is not believed, whoever sent it.
func TestAnswersAreHeldAgainstTheQuestion(t *testing.T) {
	asked := new(dns.Msg)
	asked.SetQuestion("db.internal.", dns.TypeA)
	for name, c := range map[string]struct {
		change func(reply *dns.Msg)
		want   bool
	}{
		"as asked":      {func(*dns.Msg) {}, true},
		"other case":    {func(m *dns.Msg) { m.Question[0].Name = "DB.internal." }, true},
		"another name":  {func(m *dns.Msg) { m.Question[0].Name = "db2.internal." }, false},
		"another type":  {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }, false},
		"another class": {func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, false},
		"no question":   {func(m *dns.Msg) { m.Question = nil }, false},
		"two questions": {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, false},
		"a question":    {func(m *dns.Msg) { m.Response = false }, false},
	} {
		reply := new(dns.Msg)
		reply.SetReply(asked)
		c.change(reply)
		if got := answers(reply, asked); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// However many flows want a name at once, it is asked for once, and not again while it is good.
func TestResolveAsksOnce(t *testing.T) {
	u := namestest.New(t)
	u.Set(t, "db.internal", "db.internal. 60 IN A 10.0.0.5")
	r := resolver(t, u, nil)
	var work sync.WaitGroup
	for range 100 {
		work.Go(func() {
			if _, err := r.Addrs(t.Context(), "db.internal", true); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if n := u.Asked("db.internal A") + u.Asked("db.internal AAAA"); n != 2 {
		t.Errorf("%d questions for 100 flows", n)
	}
}

func TestHostsAndSearch(t *testing.T) {
	dir := t.TempDir()
	hosts := filepath.Join(dir, "hosts")
	if err := os.WriteFile(hosts, []byte("10.1.1.1 Db.Internal db # the database\nfd00::1 db.internal\nnonsense here\n10.1.1.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	u := namestest.New(t)
	u.Set(t, "cache.corp", "cache.corp. 60 IN A 10.2.2.2")
	r := resolver(t, u, func(o *ResolverOptions) { o.Hosts = hosts })
	r.conf.conf.search = []string{"example", "corp"}
	for name, want := range map[string]string{"db.internal": "[fd00::1 10.1.1.1]", "db": "[10.1.1.1]", "cache": "[10.2.2.2]"} {
		if got, err := r.Addrs(t.Context(), name, true); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v; want %s", name, got, err, want)
		}
	}
	if got := parseConf([]byte("search corp.example EXAMPLE\nnameserver 10.0.0.2\nnameserver fd00::2\nnameserver junk\n")); fmt.Sprint(got.servers, got.search) != "[10.0.0.2:53 [fd00::2]:53] [corp.example example]" {
		t.Errorf("resolv.conf: %v", got)
	}
	if got := parseConf([]byte("\x00")); len(got.servers) != 2 {
		t.Errorf("no resolv.conf: %v", got)
	}
}

// A changed file is noticed, though not looked at for every name.
func TestFilesAreReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	synctest.Test(t, func(t *testing.T) {
		h := newHostsFile(path)
		if got := h.lookup("a"); got != nil {
			t.Errorf("no file: %v", got)
		}
		for i, content := range []string{"10.0.0.1 a", "10.0.0.22 a"} {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			before := h.lookup("a")
			time.Sleep(fileEvery)
			if got := h.lookup("a"); len(got) != 1 || len(before) != i {
				t.Errorf("after %q: %v, before %v", content, got, before)
			}
		}
	})
}

func TestCache(t *testing.T) {
	now := time.Now()
	c := newCache(2)
	q := func(n string) question { return question{n, dns.TypeA} }
	c.put(q("a"), entry{expires: now.Add(time.Second)})
	c.put(q("b"), entry{expires: now.Add(time.Minute)})
	if _, ok := c.get(q("a"), now); !ok {
		t.Error("a is gone too soon")
	}
	c.put(q("c"), entry{expires: now.Add(time.Minute)}) // b was used longest ago
	if _, ok := c.get(q("b"), now); ok {
		t.Error("the cache grows over its size")
	}
	if _, ok := c.get(q("a"), now.Add(time.Second)); ok {
		t.Error("an answer outlives its time")
	}
	c.put(q("c"), entry{err: ErrNoName, expires: now.Add(time.Minute)})
	if e, ok := c.get(q("c"), now); !ok || e.err == nil || len(c.items) != 1 || c.order.Len() != 1 {
		t.Errorf("%+v, %d", e, c.order.Len())
	}
}

// TestNamesOfJobsKeepNoOtherWaiting: jobs ask for names that they have thought of, below wildcards, of servers that never answer. Names that
// grants spell out are resolved meanwhile.
func TestNamesOfJobsKeepNoOtherWaiting(t *testing.T) {
	u := namestest.New(t)
	u.Set(t, "db.internal", "db.internal. 60 IN A 10.0.0.5")
	u.SetSilent(true)
	r := resolver(t, u, func(o *ResolverOptions) { o.Timeout, o.Concurrent = time.Hour, 4 })
	for i := range 2 * maxPending {
		c := r.begin(errand{question{fmt.Sprintf("n%d.evil.example", i), dns.TypeA}, false})
		if i < maxPending/2 == (c.done == decided) {
			t.Fatalf("question %d: %v", i, c.err)
		}
	}
	for u.Questions() == 0 {
		time.Sleep(time.Millisecond) // a real socket, whose time cannot be faked
	}
	u.SetSilent(false)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if got, err := r.Addrs(ctx, "db.internal", true); err != nil || fmt.Sprint(got) != "[10.0.0.5]" {
		t.Errorf("%v, %v", got, err)
	}
	r.Close()
	if c := r.Counts(); c.Pending != 0 || r.free != 0 || len(r.slots)+len(r.loose) != 0 {
		t.Errorf("%+v, %d, %d and %d places", c, r.free, len(r.slots), len(r.loose))
	}
}

func TestCloseEndsQueries(t *testing.T) {
	u := namestest.New(t)
	u.SetSilent(true)
	r := resolver(t, u, func(o *ResolverOptions) { o.Timeout = time.Hour })
	var work sync.WaitGroup
	work.Go(func() {
		if _, err := r.Addrs(context.Background(), "db.internal", true); err == nil {
			t.Error("a closed resolver answers")
		}
	})
	for u.Questions() == 0 {
		time.Sleep(time.Millisecond) // a real socket, whose time cannot be faked
	}
	r.Close()
	work.Wait()
	if _, err := r.Addrs(context.Background(), "db.internal", true); err == nil {
		t.Error("a closed resolver answers")
	}
}
