// Package doctor tests what Culvert needs from a network, from where it runs, and prints the table that a firewall team asks for. What is
// needed is said in package requirements alone.
package doctor

import (
	"cmp"
	"context"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/requirements"
)

// atOnce is how many tests run at the same time.
const atOnce = 8

// Options configure a test.
type Options struct {
	Party requirements.Party
	// Facts are what is known of the installation. Where a coordinator is named, what it lists of STUN servers and relays is added.
	Facts requirements.Facts
	// InsecureHTTP accepts relays over plain HTTP beyond loopback.
	InsecureHTTP bool
	// Transport does the requests; default one that goes through the environment's proxies.
	Transport *egress.Transport
	// Timeout bounds one test; default 5 s.
	Timeout time.Duration
}

// Status is how a row or a check came out.
type Status string

// The statuses. Untested is what cannot be tested from where the program runs.
const (
	OK       Status = "ok"
	Failed   Status = "failed"
	Untested Status = "untested"
)

// Report is what was found. Its JSON form is described field by field in docs/network-requirements.md, which a test holds
// against it.
type Report struct {
	Party requirements.Party `json:"party"`
	OK    bool               `json:"ok"`              // nothing that is required failed
	Proxy string             `json:"proxy,omitempty"` // through which HTTPS goes, without credentials
	Rows  []Row              `json:"rows"`
}

// Row is one row of the table and what was found.
type Row struct {
	ID        string                 `json:"id"`
	Direction requirements.Direction `json:"direction"`
	With      string                 `json:"with"`
	Protocol  string                 `json:"protocol"`
	Port      string                 `json:"port"`
	Carries   string                 `json:"carries"`
	Purpose   string                 `json:"purpose"`
	When      string                 `json:"when"`
	Required  bool                   `json:"required"`
	Status    Status                 `json:"status"`
	Checks    []Check                `json:"checks"`
}

// Check is one name and port that was tested.
type Check struct {
	Host      string       `json:"host"`
	Port      uint16       `json:"port,omitempty"`
	Addresses []netip.Addr `json:"addresses"` // none where a proxy looks the name up
	OK        bool         `json:"ok"`
	RTT       float64      `json:"rtt_ms,omitempty"` // of the answer; over HTTPS with the time to connect
	Found     string       `json:"found"`
}

// Run tests everything. What fails is part of the report.
func Run(ctx context.Context, opts Options) *Report {
	if opts.Transport == nil {
		opts.Transport = netcheck.NewTransport()
	}
	defer opts.Transport.CloseIdleConnections()
	opts.Timeout = cmp.Or(opts.Timeout, 5*time.Second)
	e := &examiner{Options: opts, slots: make(chan struct{}, atOnce)}
	e.learn(ctx)
	report := &Report{Party: opts.Party, OK: true}
	if opts.Facts.Coordinator != nil {
		if proxy := opts.Transport.ProxyFor(opts.Facts.Coordinator); proxy != nil {
			report.Proxy = proxy.String()
		}
	}
	rows := requirements.For(opts.Party)
	report.Rows = make([]Row, len(rows))
	var wg sync.WaitGroup
	for i, r := range rows {
		report.Rows[i] = Row{
			ID: r.ID, Direction: r.Direction, With: plainText(r.Peer), Protocol: r.Protocol, Port: plainText(r.Port), Carries: r.Carries,
			Purpose: plainText(r.Purpose), When: plainText(r.When), Required: r.Required, Checks: []Check{},
		}
		wg.Go(func() { e.examine(ctx, &report.Rows[i], r.Targets(e.Facts)) })
	}
	wg.Wait()
	for _, r := range report.Rows {
		if r.Required && r.Status == Failed {
			report.OK = false
		}
	}
	return report
}

// examiner is one run.
type examiner struct {
	Options
	slots chan struct{}
}

// learn asks the coordinator what it lists. Where it does not answer, its ports are taken to be the usual ones.
func (e *examiner) learn(ctx context.Context) {
	f := &e.Facts
	if f.Coordinator == nil || len(f.STUN) > 0 || len(f.Relays) > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, e.Timeout)
	defer cancel()
	info, _, err := netcheck.FetchInfo(ctx, e.Transport, f.Coordinator)
	if err != nil {
		f.STUN = []string{":3478", ":3479"}
		return
	}
	f.STUN, f.Relays = info.STUN, info.Relays
}

// examine tests all targets of a row.
func (e *examiner) examine(ctx context.Context, row *Row, targets []requirements.Target) {
	row.Checks = make([]Check, len(targets))
	var wg sync.WaitGroup
	for i, t := range targets {
		row.Checks[i] = Check{Host: netcheck.Printable(t.Host), Port: t.Port, Addresses: []netip.Addr{}}
		wg.Go(func() {
			e.slots <- struct{}{}
			defer func() { <-e.slots }()
			ctx, cancel := context.WithTimeout(ctx, e.Timeout)
			defer cancel()
			e.test(ctx, t, &row.Checks[i])
		})
	}
	wg.Wait()
	row.Status = Untested
	for _, c := range row.Checks {
		if !c.OK {
			row.Status = Failed
			return
		}
		row.Status = OK
	}
}

// proxied reports whether a URL is reached through a proxy, which then looks its name up.
func (e *examiner) proxied(address string) bool {
	u, err := url.Parse(address)
	return err == nil && e.Transport.ProxyFor(u) != nil
}

// plainText takes Markdown's marks off.
func plainText(s string) string { return strings.ReplaceAll(s, "`", "") }
