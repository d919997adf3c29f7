package policy

import (
	"slices"
	"strings"
)

// explicitEvents run with the rights of the base repository on a stranger's input. A rule admits them only if its match
// spells them out under event_name; a wildcard does not.
var explicitEvents = []string{"pull_request_target", "workflow_run"}

// mayTrigger tells whether the event that started the job is one that the rule need not, or does, spell out. Case and
// surrounding space are ignored when looking for an event to refuse, never when looking for one to admit.
func (w *way) mayTrigger(c Claims) bool {
	got, _ := c.Get(claimEvent)
	if !slices.Contains(explicitEvents, strings.ToLower(strings.TrimSpace(got))) {
		return true
	}
	for _, spelt := range w.events {
		if !slices.Contains(spelt, got) {
			return false
		}
	}
	return len(w.events) > 0
}

// expectedEvents says what a denial expects of the event.
func (w *way) expectedEvents() []string {
	if len(w.events) > 0 {
		return w.events[0]
	}
	return []string{"any event but " + strings.Join(explicitEvents, " and ") + ", which a rule has to name"}
}
