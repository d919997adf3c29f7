// Package control is how `culvert status`, `down`, `check` and `exec` talk to the process that holds the tunnel: HTTP and
// JSON over a local socket, with the credentials of both ends checked by the kernel.
//
// On Linux the socket is abstract (unix(7)), so that nothing is left when the process is killed. Elsewhere it is a file in
// a folder that only its user may enter.
package control

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Paths of the API.
const (
	pathStatus = "/v1/status" // GET: [Status]
	pathDown   = "/v1/down"   // POST: answered when everything is closed
	pathCheck  = "/v1/check"  // POST [wire.ReachRequest]: [wire.ReachResult]
)

// maxBody bounds a request and an answer, in bytes.
const maxBody = 1 << 20

// State is where a tunnel is in its life.
//
//	joining ──► up ◄──► rejoining
//	   │         │          │
//	   └─────────┴──────────┴────► closing ──► ended
type State string

// The states.
const (
	Joining   State = "joining"   // not usable yet
	Up        State = "up"        // usable
	Rejoining State = "rejoining" // was up, has lost its gateway, asks for a new session
	Closing   State = "closing"   // on its way down
	Ended     State = "ended"     // the session is over for good; Problem says why
)

// Status is a tunnel as `culvert status` shows it.
type Status struct {
	State     State      `json:"state"`
	Session   string     `json:"session,omitempty"`
	Network   string     `json:"network,omitempty"`
	Mode      string     `json:"mode"`
	Interface string     `json:"interface,omitempty"` // in mode tun
	Proxy     string     `json:"proxy,omitempty"`     // in mode proxy, "IP:port"
	Addresses []string   `json:"addresses,omitempty"`
	Gateway   string     `json:"gateway,omitempty"`
	Standby   string     `json:"standby,omitempty"` // the gateway that would take its place, while there is a path to it
	Rules     []string   `json:"rules,omitempty"`
	Path      *Path      `json:"path,omitempty"` // nil without one
	Handshake *time.Time `json:"handshake,omitempty"`
	RxBytes   uint64     `json:"rx_bytes"`
	TxBytes   uint64     `json:"tx_bytes"`
	Routes    []string   `json:"routes,omitempty"`
	Names     []string   `json:"names,omitempty"`    // granted; "*.svc.corp" for all below svc.corp
	LeftOut   []string   `json:"left_out,omitempty"` // granted, but reached without the tunnel: directly connected
	Expires   *time.Time `json:"expires,omitempty"`  // the lease, unless renewed
	Ends      *time.Time `json:"ends,omitempty"`     // no renewal reaches past this
	Since     time.Time  `json:"since"`
	// What the gateway says of the session's flows, where it answers.
	Flows   *wire.FlowCounts `json:"flows,omitempty"`
	Reached []wire.Reached   `json:"reached,omitempty"`
	More    uint64           `json:"more,omitempty"` // flows to targets that are not in Reached
	Rejoins int              `json:"rejoins"`
	History []Event          `json:"history,omitempty"` // oldest first
	Problem *problem.Error   `json:"problem,omitempty"` // the last one, until things work again
	Log     []string         `json:"log,omitempty"`     // the last lines
	PID     int              `json:"pid"`
}

// Path is the way that packets take to the gateway.
type Path struct {
	Kind      string  `json:"kind"`             // host, reflexive, public, mapped, observed: direct; or relay
	Remote    string  `json:"remote,omitempty"` // the gateway's address, or the relay's; none over a WebSocket
	Relay     string  `json:"relay,omitempty"`  // the relay's name
	Transport string  `json:"transport"`        // udp or websocket
	RTT       float64 `json:"rtt_ms"`           // smoothed, in milliseconds
	// What the path loses: the share of packets sent that the gateway has lately not got, whether parities are sent because of that, and
	// how many of the gateway's packets were lost and rebuilt in this session.
	Lost     float64 `json:"lost"`
	Parities bool    `json:"parities"`
	Rebuilt  uint64  `json:"rebuilt"`
}

// Words is the path as people read it.
func (p Path) Words() string {
	switch {
	case p.Relay != "" && p.Transport == "websocket":
		return fmt.Sprintf("through relay %s over a WebSocket", p.Relay)
	case p.Relay != "":
		return fmt.Sprintf("through relay %s at %s", p.Relay, p.Remote)
	}
	return fmt.Sprintf("direct, %s %s", p.Kind, p.Remote)
}

// Event is one thing that happened to a tunnel.
type Event struct {
	At   time.Time `json:"at"`
	What string    `json:"what"`
}

// Handler is what a server serves.
type Handler interface {
	// Status is the tunnel at this moment.
	Status() Status
	// Claim is what the tunnel has of the host.
	Claim() Claim
	// Check asks the gateway whether "host:port" can be reached.
	Check(ctx context.Context, target string) (wire.ReachResult, error)
	// Down ends the tunnel and returns when it is closed, or ctx ended.
	Down(ctx context.Context) error
}

var nameShape = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$`)

// ValidateName refuses a tunnel name that is not 1 to 32 letters, digits, dots, dashes or underscores.
func ValidateName(name string) error {
	if nameShape.MatchString(name) {
		return nil
	}
	return problem.New(problem.Usage, "the name of a tunnel is 1 to 32 letters, digits, dots, dashes or underscores",
		"choose another --name")
}

// sudoUID is the user on whose behalf root runs, or -1. The variable is believed only from root, who needs no trick.
func sudoUID() int {
	if os.Geteuid() != 0 {
		return -1
	}
	uid, err := strconv.Atoi(os.Getenv("SUDO_UID"))
	if err != nil || uid < 0 {
		return -1
	}
	return uid
}

// Users are the users whom this process serves: its own, root, and the one who started it with sudo.
func Users() []int {
	users := []int{os.Geteuid()}
	if users[0] != 0 {
		users = append(users, 0)
	}
	if uid := sudoUID(); uid > 0 {
		users = append(users, uid)
	}
	return users
}
