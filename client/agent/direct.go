package agent

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/internal/problem"
)

// DirectGitHub stands for GitHub's services in [Options.Direct].
const DirectGitHub = "github"

// gitHubHosts are what GitHub documents a runner to need (Self-hosted runners reference, "Accessible domains by function"), but for
// wildcards, which nobody can look up: of them stands here what is known to be used, and the runner's own variables name the rest.
var gitHubHosts = []string{
	"github.com", "api.github.com", "codeload.github.com", "uploads.github.com", "ghcr.io",
	"pipelines.actions.githubusercontent.com", "results-receiver.actions.githubusercontent.com", "broker.actions.githubusercontent.com",
	"token.actions.githubusercontent.com", "vstoken.actions.githubusercontent.com", "pkg.actions.githubusercontent.com",
	"artifactcache.actions.githubusercontent.com",
	"raw.githubusercontent.com", "objects.githubusercontent.com", "objects-origin.githubusercontent.com", "release-assets.githubusercontent.com",
	"github-releases.githubusercontent.com", "github-registry-files.githubusercontent.com", "github-cloud.githubusercontent.com",
	"pkg-containers.githubusercontent.com", "npm.pkg.github.com", "maven.pkg.github.com", "nuget.pkg.github.com", "rubygems.pkg.github.com",
	"github-cloud.s3.amazonaws.com", "dependabot-actions.githubapp.com",
}

const (
	maxDirect   = 256             // entries, and names
	maxAside    = 2048            // addresses
	asideLimit  = 3 * time.Second // for looking all names up
	asideAgain  = time.Minute     // between two times: services move, and a job may last for hours
	asideAtOnce = 16              // names that are looked up at the same time
	nextDirect  = "write --direct with addresses, CIDRs or host names, such as 192.0.2.0/24 or mirror.example.com, or github for GitHub's services"
)

var hostName = regexp.MustCompile(`^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

// aside is what stays outside the tunnel because the job wants it there, whatever is granted.
type aside struct {
	prefixes []netip.Prefix
	names    []string      // asked for by the job
	usual    []string      // GitHub's: no harm where one of them does not exist
	known    chan struct{} // closed when all names have been looked up for the first time

	mu    sync.Mutex
	addrs map[netip.Addr]struct{} // that the names had at any time; connections to them may last
}

// newAside reads --direct. The runner's own hosts come along with GitHub's. Errors are *problem.Error.
func newAside(entries, runner []string) (*aside, error) {
	s := &aside{known: make(chan struct{}), addrs: map[netip.Addr]struct{}{}}
	bad := func(format string, args ...any) (*aside, error) {
		return nil, problem.New(problem.Usage, fmt.Sprintf(format, args...), nextDirect)
	}
	if len(entries) > maxDirect {
		return bad("--direct takes %d destinations at most", maxDirect)
	}
	for _, entry := range entries {
		name := strings.ToLower(strings.TrimSuffix(entry, "."))
		if prefix, err := netip.ParsePrefix(entry); err == nil {
			s.prefixes = append(s.prefixes, prefix.Masked())
		} else if addr, err := netip.ParseAddr(entry); err == nil && addr.Zone() == "" {
			s.prefixes = append(s.prefixes, hostPrefixes([]netip.Addr{addr.Unmap()})...)
		} else if name == DirectGitHub {
			s.usual = slices.Concat(s.usual, gitHubHosts, runner)
		} else if strings.Contains(entry, "*") {
			return bad("%q cannot be kept outside the tunnel: nobody can look up what a wildcard stands for", entry)
		} else if len(name) > 253 || !hostName.MatchString(name) || strings.Trim(name, "0123456789.") == "" {
			return bad("%q is no destination", entry)
		} else {
			s.names = append(s.names, name)
		}
	}
	slices.Sort(s.names)
	slices.Sort(s.usual)
	s.names, s.usual = slices.Compact(s.names), slices.Compact(s.usual)
	return s, nil
}

// without leaves the job's CIDRs out of what a gateway grants.
func (s *aside) without(routes []netip.Prefix) []netip.Prefix {
	if s == nil || len(s.prefixes) == 0 {
		return routes
	}
	return host.Without(routes, s.prefixes)
}

// list gives the addresses that names have had.
func (s *aside) list() []netip.Addr {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]netip.Addr, 0, len(s.addrs))
	for addr := range s.addrs {
		list = append(list, addr)
	}
	return list
}

// holds reports whether an address is one that a name has had.
func (s *aside) holds(addr netip.Addr) bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.addrs[addr]
	return ok
}

// add notes a name's addresses and gives those that are new.
func (s *aside) add(addrs []netip.Addr) (fresh []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, addr := range addrs {
		addr = addr.Unmap()
		if _, known := s.addrs[addr]; known || !unicast(addr) || len(s.addrs) >= maxAside {
			continue
		}
		s.addrs[addr] = struct{}{}
		fresh = append(fresh, addr)
	}
	return fresh
}

// keepAside looks names up at once, and again and again until ctx ends.
func (a *Agent) keepAside(ctx context.Context) {
	if len(a.aside.names)+len(a.aside.usual) == 0 {
		close(a.aside.known)
		return
	}
	missing := a.lookAside(ctx)
	close(a.aside.known)
	if len(missing) > 0 && ctx.Err() == nil {
		a.log.Warn("names that are to stay outside the tunnel do not resolve", "names", missing)
	}
	for {
		timer := time.NewTimer(asideAgain)
		select {
		case <-timer.C:
			a.lookAside(ctx)
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// lookAside looks each name up once, and has routes make room for what is new. It tells which of the job's names have no address; GitHub's
// count as one.
func (a *Agent) lookAside(ctx context.Context) (missing []string) {
	ctx, cancel := context.WithTimeout(ctx, asideLimit)
	defer cancel()
	names := slices.Concat(a.aside.names, a.aside.usual)
	found := make([][]netip.Addr, len(names))
	var group sync.WaitGroup
	slots := make(chan struct{}, asideAtOnce)
	for i, name := range names {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			found[i], _ = a.opts.lookup(ctx, name)
		})
	}
	group.Wait()
	usual := 0
	for i, addrs := range found {
		switch {
		case i >= len(a.aside.names):
			usual += len(addrs)
		case len(addrs) == 0:
			missing = append(missing, names[i])
		}
	}
	if len(a.aside.usual) > 0 && usual == 0 {
		missing = append(missing, DirectGitHub)
	}
	if fresh := a.aside.add(slices.Concat(found...)); len(fresh) > 0 {
		a.keepOutside(fresh...)
	}
	return missing
}
