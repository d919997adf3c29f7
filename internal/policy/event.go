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
func (r *rule) mayTrigger(c Claims) bool {
	got, _ := c.Get(claimEvent)
	if !slices.Contains(explicitEvents, strings.ToLower(strings.TrimSpace(got))) {
		return true
	}
	return slices.Contains(r.events, got)
}

// expectedEvents says what a denial expects of the event.
func (r *rule) expectedEvents() []string {
	for i := range r.claims {
		if r.claims[i].claim == claimEvent {
			return r.claims[i].values
		}
	}
	return []string{"any event but " + strings.Join(explicitEvents, " and ") + ", which a rule has to name"}
}
