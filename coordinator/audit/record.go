package audit

import (
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Event names what a record is about. It is metadata.event_code.
type Event string

// The events. Each happens once for what it is about; a join whose record says one gateway and that another took is
// followed by Placed.
const (
	Broken     Event = "audit.broken"       // something stands in the log that no coordinator wrote
	Lost       Event = "audit.lost"         // records that nobody waited for could not be stored
	Started    Event = "coordinator.start"  // with the retention in force
	Stopped    Event = "coordinator.stop"   //
	Policy     Event = "policy.change"      // a configuration came into force; what changed
	Join       Event = "session.join"       // policy said yes; stored before gateway and job hear of it
	Placed     Event = "session.place"      // another gateway than the record of the join says took the session
	Unplaced   Event = "session.fail"       // policy said yes, but the session did not come about
	Denied     Event = "session.deny"       // policy said no to a verified token
	Renew      Event = "session.renew"      //
	RenewDeny  Event = "session.renew-deny" //
	Moved      Event = "session.move"       // the standby gateway carries the session from now on
	Adopted    Event = "session.adopt"      // a gateway holds a session that is not known here, and keeps it
	End        Event = "session.end"        //
	Flows      Event = "session.flows"      // a batch of flows, as the gateway reports them
	Enrolled   Event = "gateway.enrol"      // a gateway's stream was let in
	Unenrolled Event = "gateway.leave"      // its stream is over
	KeyChange  Event = "gateway.key-change" // a gateway of this name had another key before
	Refused    Event = "request.refuse"     // requests refused before a token was verified, or of strangers, counted
)

// Record is one entry of the log. Field names are those of the Open Cybersecurity Schema Framework (OCSF 1.3) where it has
// one; what it has none for is in Unmapped. The log adds prev and metadata.
//
// Nothing in a record is a secret: no token, session secret, ticket or private key.
type Record struct {
	Event Event `json:"-"`

	Time     int64    `json:"time"` // milliseconds since 1970; set by the log where it is 0
	Class    int      `json:"class_uid"`
	Category int      `json:"category_uid"`
	Activity int      `json:"activity_id"`
	Type     int      `json:"type_uid"`
	Severity Severity `json:"severity_id"`
	Status   int      `json:"status_id,omitempty"` // 1 success, 2 failure
	Action   int      `json:"action_id,omitempty"` // 1 allowed, 2 denied
	Code     string   `json:"status_code,omitempty"`
	Detail   string   `json:"status_detail,omitempty"`
	Message  string   `json:"message,omitempty"`
	Count    uint64   `json:"count,omitempty"` // how many events the record stands for; 0 is 1

	Actor          *Actor          `json:"actor,omitempty"`
	Source         *Endpoint       `json:"src_endpoint,omitempty"`
	Session        *Session        `json:"session,omitempty"`
	Authorizations []Authorization `json:"authorizations,omitempty"`
	Entity         *Entity         `json:"entity,omitempty"`
	EntityResult   *Entity         `json:"entity_result,omitempty"`
	Unmapped       Unmapped        `json:"unmapped"`
}

// Severity is severity_id.
type Severity int

// The severities that records have.
const (
	Informational Severity = 1
	Low           Severity = 2
	Medium        Severity = 3
	High          Severity = 4
)

// Actor is the account that started the job's run.
type Actor struct {
	User User `json:"user"`
}

// User is an account at the issuer.
type User struct {
	Name string `json:"name,omitempty"`
	UID  string `json:"uid,omitempty"`
}

// Endpoint is one end of a connection.
type Endpoint struct {
	IP   string `json:"ip,omitempty"`
	Port uint16 `json:"port,omitempty"`
	Host string `json:"hostname,omitempty"`
}

// Session is a session's place in time; times are milliseconds since 1970.
type Session struct {
	UID     string `json:"uid"`
	Issuer  string `json:"issuer,omitempty"`
	Created int64  `json:"created_time,omitempty"`
	Expires int64  `json:"expiration_time,omitempty"` // of the lease
	Reason  string `json:"expiration_reason,omitempty"`
}

// Authorization is a rule's part in a decision.
type Authorization struct {
	Decision string `json:"decision"` // "allowed" or "denied"
	Policy   Named  `json:"policy"`
}

// Named is anything that has a name.
type Named struct {
	Name string `json:"name"`
}

// Entity is what a change is about.
type Entity struct {
	Name string `json:"name,omitempty"`
	UID  string `json:"uid,omitempty"`
	Type string `json:"type,omitempty"`
}

// Unmapped is what OCSF has no field for.
type Unmapped struct {
	Network   string            `json:"network,omitempty"`
	Job       *Job              `json:"job,omitempty"`
	Gateway   string            `json:"gateway,omitempty"`
	Instance  string            `json:"instance,omitempty"` // of the gateway's process
	Key       string            `json:"key,omitempty"`      // a WireGuard public key
	Addresses []netip.Addr      `json:"addresses,omitempty"`
	Grants    []wire.Grant      `json:"grants,omitempty"`
	Denial    *problem.Denial   `json:"denial,omitempty"` // the rule that came closest
	Client    string            `json:"client,omitempty"` // the client's own word on its version
	Ends      int64             `json:"ends,omitempty"`   // the session's longest end, milliseconds since 1970
	By        string            `json:"by,omitempty"`     // whose word it is: client, gateway, coordinator
	Change    *Change           `json:"change,omitempty"` // of the policy
	Refusals  []Refusal         `json:"refusals,omitempty"`
	Flows     []wire.FlowRecord `json:"flows,omitempty"`    // as the gateway reported them
	Batch     uint64            `json:"batch,omitempty"`    // the gateway's number for these; with instance, it tells what came twice
	Keep      string            `json:"keep,omitempty"`     // retention by age
	MaxSize   int64             `json:"max_size,omitempty"` // retention by size, bytes
	Instead   string            `json:"instead,omitempty"`  // SHA-256 of what stands in the log and is not ours
	Program   string            `json:"program,omitempty"`  // version and platform
}

// Job is who a job is, by the claims of its token.
type Job struct {
	Issuer         string `json:"iss,omitempty"`
	Subject        string `json:"sub,omitempty"`
	Repository     string `json:"repository,omitempty"`
	RepositoryID   string `json:"repository_id,omitempty"`
	OwnerID        string `json:"repository_owner_id,omitempty"`
	Ref            string `json:"ref,omitempty"`
	SHA            string `json:"sha,omitempty"`
	Event          string `json:"event_name,omitempty"`
	Environment    string `json:"environment,omitempty"`
	Workflow       string `json:"workflow,omitempty"`
	WorkflowRef    string `json:"workflow_ref,omitempty"`
	JobWorkflowRef string `json:"job_workflow_ref,omitempty"`
	RunID          string `json:"run_id,omitempty"`
	RunAttempt     string `json:"run_attempt,omitempty"`
	CheckRunID     string `json:"check_run_id,omitempty"`
	Runner         string `json:"runner_environment,omitempty"`
}

// Change says how one policy differs from the one before. Rules count by name and by all that they say.
type Change struct {
	SHA256   string   `json:"sha256"` // of the rules in force, in a form of our own
	Rules    int      `json:"rules"`
	Networks []string `json:"networks"`
	Added    []string `json:"added,omitempty"`
	Removed  []string `json:"removed,omitempty"`
	Changed  []string `json:"changed,omitempty"`
	Other    []string `json:"other,omitempty"` // what else changed: issuers, gateways of a network, the lease
}

// Refusal counts requests that were refused alike.
type Refusal struct {
	Code  problem.Code `json:"code"`
	From  string       `json:"from,omitempty"` // the address that sent most of them
	Count uint64       `json:"count"`
}

// kind is what OCSF makes of an event.
type kind struct{ class, activity int }

// OCSF's classes.
const (
	lifecycleClass  = 6002 // Application Lifecycle: 3 start, 4 stop
	entityClass     = 3004 // Entity Management: 1 create, 3 update
	authClass       = 3002 // Authentication: 1 logon, 2 logoff
	tunnelClass     = 4014 // Tunnel Activity: 1 open, 2 close, 3 renew
	networkClass    = 4001 // Network Activity: 6 traffic
	otherActivity   = 99
	schemaVersion   = "1.3.0"
	statusSuccess   = 1
	statusFailure   = 2
	actionAllowed   = 1
	actionDenied    = 2
	decisionAllowed = "allowed"
	decisionDenied  = "denied"
)

var kinds = map[Event]kind{
	Broken: {lifecycleClass, otherActivity}, Lost: {lifecycleClass, otherActivity},
	Started: {lifecycleClass, 3}, Stopped: {lifecycleClass, 4}, Policy: {entityClass, 3}, KeyChange: {entityClass, 3},
	Join: {tunnelClass, 1}, Placed: {tunnelClass, otherActivity}, Unplaced: {tunnelClass, 2}, Denied: {tunnelClass, 1},
	Renew: {tunnelClass, 3}, RenewDeny: {tunnelClass, 3}, Adopted: {tunnelClass, otherActivity}, Moved: {tunnelClass, otherActivity}, End: {tunnelClass, 2},
	Flows: {networkClass, 6}, Enrolled: {authClass, 1}, Unenrolled: {authClass, 2}, Refused: {authClass, 1},
}

// Events lists every event in alphabetical order.
func Events() []Event { return sortedKeys(kinds) }

// complete fills in what follows from the event.
func (r *Record) complete(now time.Time) {
	k := kinds[r.Event]
	r.Class, r.Category, r.Activity, r.Type = k.class, k.class/1000, k.activity, k.class*100+k.activity
	if r.Time == 0 {
		r.Time = now.UnixMilli()
	}
	if r.Severity == 0 {
		r.Severity = Informational
	}
}

// Allowed marks a record as a yes by rules.
func (r *Record) Allowed(rules []string) {
	r.Status, r.Action = statusSuccess, actionAllowed
	for _, name := range rules {
		r.Authorizations = append(r.Authorizations, Authorization{decisionAllowed, Named{name}})
	}
}

// Succeeded marks a record as something that was done.
func (r *Record) Succeeded() { r.Status = statusSuccess }

// Refuse marks a record as a no: policy's, or what kept a session from coming about.
func (r *Record) Refuse(err error) {
	p := problem.From(err)
	r.Status, r.Action, r.Code, r.Detail = statusFailure, actionDenied, string(p.Code), clip(p.Message, 500)
	r.Severity = Low
	if p.Denial != nil {
		r.Unmapped.Denial = p.Denial
		r.Authorizations = []Authorization{{decisionDenied, Named{p.Denial.Rule}}}
	}
}

// From says where a request came from.
func (r *Record) From(addr netip.Addr) {
	if addr.IsValid() {
		r.Source = &Endpoint{IP: addr.String()}
	}
}

// Identify says whose job it is.
func (r *Record) Identify(c policy.Claims) {
	get := func(name string) string { v, _ := c.Get(name); return clip(v, 512) }
	j := &Job{
		Issuer: get("iss"), Subject: get("sub"), Repository: get("repository"), RepositoryID: get("repository_id"),
		OwnerID: get("repository_owner_id"), Ref: get("ref"), SHA: get("sha"), Event: get("event_name"),
		Environment: get("environment"), Workflow: get("workflow"), WorkflowRef: get("workflow_ref"),
		JobWorkflowRef: get("job_workflow_ref"), RunID: get("run_id"), RunAttempt: get("run_attempt"),
		CheckRunID: get("check_run_id"), Runner: get("runner_environment"),
	}
	if *j == (Job{}) {
		return
	}
	r.Unmapped.Job = j
	if u := (User{get("actor"), get("actor_id")}); u != (User{}) {
		r.Actor = &Actor{u}
	}
}

// Millis gives a time as records have it; 0 for the zero time.
func Millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// clip shortens what somebody else wrote.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}
