package main

import (
	"bufio"
	"fmt"
	"os"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/internal/problem"
)

// suggestCmd turns what jobs did into what they may do.
type suggestCmd struct {
	auditSource
	auditFilter
	From   string `required:"" placeholder:"audit|FILE" help:"audit: the coordinator's audit log; or an export of it, or its copy."`
	Denied bool   `help:"Cover what was denied as well."`
}

func (c *suggestCmd) Run() error {
	s := audit.Suggester{Denied: c.Denied}
	if err := c.learn(&s); err != nil {
		return err
	}
	suggestions := s.Suggestions()
	if len(suggestions) == 0 {
		return problem.New(problem.NotFound, "no record of a flow matches", "widen the filter; flows of a session are on record some seconds after they end; --from takes an export, and not one in OCSF")
	}
	for i := range suggestions {
		if err := suggestions[i].Write(os.Stdout); err != nil {
			return err
		}
	}
	return nil
}

func (c *suggestCmd) learn(s *audit.Suggester) error {
	ctx, stop := interruptible()
	defer stop()
	c.Event = []string{string(audit.Flows)}
	if c.From == "audit" {
		source, done, err := c.open(ctx)
		if err != nil {
			return err
		}
		defer done()
		return source.Records(ctx, c.query(), func(line []byte) bool { s.Learn(line); return true })
	}
	f, err := os.Open(c.From)
	if err != nil {
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("the records cannot be read: %v", err), "give --from audit, or the path of an export")
	}
	defer f.Close()
	return audit.Select(bufio.NewReader(f), c.query(), s.Learn)
}
