package agent

import (
	"context"
	"crypto/sha256"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// readPolicy reads a policy file of the gateway's own, unless its digest is last: p is nil then. digest is set whenever the
// file could be read.
func readPolicy(file string, issuers []string, last [sha256.Size]byte) (p *policy.Policy, digest [sha256.Size]byte, err error) {
	data, err := readBounded(file, yamlfile.MaxSize)
	if err != nil {
		return nil, digest, problem.Wrap(err, problem.BadConfig, "the gateway's policy cannot be read: "+err.Error(),
			"check --policy, and that the gateway's user may read the file")
	}
	if digest = sha256.Sum256(data); digest == last {
		return nil, digest, nil
	}
	p, err = policy.ParseFile(file, data, policy.Options{Issuers: issuers})
	return p, digest, err
}

// watchPolicy takes up a changed policy file and holds every session against it. A broken file is refused, loudly and once, and
// the old one stays in force. The file is read rather than its time compared: mounted configuration is swapped by links.
func (d *door) watchPolicy(ctx context.Context, file string) {
	tick := time.NewTicker(policyEvery)
	defer tick.Stop()
	last := d.judge.digest
	expiry := nextExpiry(d.judge.policy.Load())
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if !expiry.IsZero() && !time.Now().Before(expiry) {
			d.log.Info("a rule has expired", "file", file)
			d.rejudgeAll()
			expiry = nextExpiry(d.judge.policy.Load())
		}
		p, digest, err := readPolicy(file, d.judge.issuers, last)
		if digest == last {
			continue
		}
		last = digest
		if err != nil {
			e := problem.From(err)
			d.log.Error("the changed policy file is refused; the old one stays in force", "file", file,
				"code", e.Code, "err", e.Message, "next", e.Next)
			continue
		}
		d.judge.policy.Store(p)
		expiry = nextExpiry(p)
		d.log.Info("policy file taken up", "file", file)
		d.rejudgeAll()
	}
}

// nextExpiry is when the next of a policy's rules expires; the zero time where none does.
func nextExpiry(p *policy.Policy) time.Time {
	at, _ := p.NextExpiry(time.Now())
	return at
}
