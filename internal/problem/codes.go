package problem

import "net/http"

// Code names one kind of error. Codes are part of the API: they are added to, never renamed.
type Code string

// The codes, each with its HTTP status, exit code and whether a retry may help in [table].
const (
	Failed       Code = "failed"       // anything unexpected
	Usage        Code = "usage"        // a wrong flag or argument
	BadConfig    Code = "bad-config"   // a configuration or policy file is wrong
	BadRequest   Code = "bad-request"  // a request that does not parse
	TooLarge     Code = "too-large"    // a request or token over its size limit
	RateLimited  Code = "rate-limited" // too many requests
	NotFound     Code = "not-found"    // no such resource
	WrongMethod  Code = "wrong-method" // the resource knows no such method
	Unauthorized Code = "unauthorized" // a gateway that is not enrolled
	Unreachable  Code = "unreachable"  // the coordinator, or something on the way to it, does not answer
	UnknownName  Code = "unknown-name" // the coordinator's name does not exist
	Certificate  Code = "certificate"  // the coordinator's certificate is not trusted
	NoTLS        Code = "no-tls"       // https, but what answers does not speak TLS
	Incompatible Code = "incompatible" // the two sides speak different versions
	Cancelled    Code = "cancelled"    // the caller gave up
	Timeout      Code = "timeout"      // a time limit ran out
	AuditBroken  Code = "audit-broken" // the audit log is not what the coordinator wrote

	TokenUnavailable Code = "token-unavailable"  // the job cannot ask for a token
	TokenRefused     Code = "token-refused"      // the issuer refused to give one
	TokenInvalid     Code = "token-invalid"      // malformed, wrong algorithm, bad signature
	TokenExpired     Code = "token-expired"      // exp has passed
	TokenEarly       Code = "token-early"        // nbf or iat lies in the future
	TokenIssuer      Code = "token-issuer"       // not an issuer that is configured
	TokenAudience    Code = "token-audience"     // not made for this coordinator and key
	TokenUnknownKey  Code = "token-unknown-key"  // signed with a key the issuer does not publish
	IssuerAway       Code = "issuer-unreachable" // its keys cannot be fetched and none are cached

	Denied         Code = "denied"          // policy says no
	KeyInUse       Code = "key-in-use"      // this WireGuard key already has a session
	NoNetwork      Code = "no-network"      // no such network, or several and none named
	NoGateway      Code = "no-gateway"      // no live gateway in the network
	NoAddress      Code = "no-address"      // the overlay range is used up
	GatewayRefused Code = "gateway-refused" // the gateway verified for itself and said no
	GatewayTimeout Code = "gateway-timeout" // the gateway did not answer in time
	GatewayKey     Code = "gateway-key"     // the gateway's key is not one that is pinned
	SessionUnknown Code = "session-unknown" // no such session, or not with this secret
	SessionOver    Code = "session-over"    // the session has ended

	NoPath          Code = "no-path"          // no path to the gateway came up in time
	NotUsable       Code = "not-usable"       // connected, but a wait-for target did not answer in time
	AlreadyUp       Code = "already-up"       // a tunnel of this name runs already
	Overlap         Code = "overlap"          // two networks of a job grant the same name or range
	NotUp           Code = "not-up"           // no tunnel of this name runs
	NeedsPrivilege  Code = "needs-privilege"  // the mode needs root or capabilities
	Unsupported     Code = "unsupported"      // not on this platform
	FlowDenied      Code = "flow-denied"      // the grant does not cover a destination
	FlowUnreachable Code = "flow-unreachable" // granted, but it does not answer behind the gateway
)

// Exit codes of the programs, part of the command line's contract.
const (
	ExitDone    = 0
	ExitFailed  = 1
	ExitUsage   = 2
	ExitDenied  = 3
	ExitTimeout = 4
)

type facts struct {
	status    int
	exit      int
	temporary bool
}

var table = map[Code]facts{
	Failed:       {http.StatusInternalServerError, ExitFailed, false},
	Usage:        {http.StatusBadRequest, ExitUsage, false},
	BadConfig:    {http.StatusBadRequest, ExitUsage, false},
	BadRequest:   {http.StatusBadRequest, ExitFailed, false},
	TooLarge:     {http.StatusRequestEntityTooLarge, ExitFailed, false},
	RateLimited:  {http.StatusTooManyRequests, ExitFailed, true},
	WrongMethod:  {http.StatusMethodNotAllowed, ExitFailed, false},
	NotFound:     {http.StatusNotFound, ExitFailed, false},
	Unauthorized: {http.StatusUnauthorized, ExitFailed, false},
	Unreachable:  {http.StatusServiceUnavailable, ExitFailed, true},
	UnknownName:  {http.StatusBadGateway, ExitFailed, false},
	Certificate:  {http.StatusBadGateway, ExitFailed, false},
	NoTLS:        {http.StatusBadGateway, ExitFailed, false},
	Incompatible: {http.StatusBadRequest, ExitFailed, false},
	Cancelled:    {http.StatusServiceUnavailable, ExitFailed, false},
	Timeout:      {http.StatusGatewayTimeout, ExitTimeout, true},
	AuditBroken:  {http.StatusInternalServerError, ExitFailed, false},

	TokenUnavailable: {http.StatusUnauthorized, ExitFailed, false},
	TokenRefused:     {http.StatusForbidden, ExitFailed, false},
	TokenInvalid:     {http.StatusUnauthorized, ExitFailed, false},
	TokenExpired:     {http.StatusUnauthorized, ExitFailed, false},
	TokenEarly:       {http.StatusUnauthorized, ExitFailed, false},
	TokenIssuer:      {http.StatusUnauthorized, ExitFailed, false},
	TokenAudience:    {http.StatusUnauthorized, ExitFailed, false},
	TokenUnknownKey:  {http.StatusUnauthorized, ExitFailed, false},
	IssuerAway:       {http.StatusServiceUnavailable, ExitFailed, true},

	Denied:         {http.StatusForbidden, ExitDenied, false},
	KeyInUse:       {http.StatusConflict, ExitFailed, false},
	NoNetwork:      {http.StatusNotFound, ExitFailed, false},
	NoGateway:      {http.StatusServiceUnavailable, ExitFailed, true},
	NoAddress:      {http.StatusServiceUnavailable, ExitFailed, true},
	GatewayRefused: {http.StatusForbidden, ExitDenied, false},
	GatewayTimeout: {http.StatusGatewayTimeout, ExitFailed, true},
	GatewayKey:     {http.StatusForbidden, ExitDenied, false},
	SessionUnknown: {http.StatusNotFound, ExitFailed, false},
	SessionOver:    {http.StatusGone, ExitFailed, false},

	NoPath:          {http.StatusGatewayTimeout, ExitTimeout, true},
	NotUsable:       {http.StatusGatewayTimeout, ExitTimeout, false},
	AlreadyUp:       {http.StatusConflict, ExitFailed, false},
	Overlap:         {http.StatusConflict, ExitFailed, false},
	NotUp:           {http.StatusNotFound, ExitFailed, false},
	NeedsPrivilege:  {http.StatusForbidden, ExitFailed, false},
	Unsupported:     {http.StatusNotImplemented, ExitFailed, false},
	FlowDenied:      {http.StatusForbidden, ExitDenied, false},
	FlowUnreachable: {http.StatusBadGateway, ExitFailed, false},
}

// Known reports whether this program knows the code. Of those that others send there may be any number.
func (c Code) Known() bool { _, ok := table[c]; return ok }

// Status is the code's HTTP status; 500 for a code this program does not know.
func (c Code) Status() int {
	if f, ok := table[c]; ok {
		return f.status
	}
	return http.StatusInternalServerError
}

// Exit is the exit code of a program that ends with this error.
func (c Code) Exit() int {
	if f, ok := table[c]; ok {
		return f.exit
	}
	return ExitFailed
}

// Temporary reports whether trying again later may help. A code this program does not know is permanent.
func (c Code) Temporary() bool { return table[c].temporary }
