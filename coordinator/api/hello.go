package api

import (
	"fmt"
	"regexp"

	"github.com/culvertnet/culvert/internal/wire"
)

// What a gateway may say of itself and of each session that it holds, in bytes or in number.
const (
	maxName      = 128
	maxHeldRules = 4096 // rules of one session; no grant has more lines
	maxRule      = 1024
	maxHeldAddrs = 8
)

// instanceID is what a gateway may call an instance of itself: at least 96 random bits in base64url or hexadecimal.
var instanceID = regexp.MustCompile(`^[A-Za-z0-9_-]{16,64}$`)

// sessionID is the form of [wire.Key.SessionID].
var sessionID = regexp.MustCompile(`^[A-Za-z0-9_-]{22}$`)

// checkHello bounds how a gateway introduces itself and says what is wrong with it, or "". Being enrolled makes a gateway
// one of the network's, not one that may fill the state or the log. What is of no use is cut out.
func checkHello(h *wire.Hello) string {
	switch {
	case h.Version != wire.Version:
		return fmt.Sprintf("this coordinator speaks version %d of the API, the gateway %d", wire.Version, h.Version)
	case !instanceID.MatchString(h.Instance):
		return "the instance id must be 16 to 64 characters of base64url"
	case h.Key.IsZero():
		return "the hello carries no public key"
	case len(h.Name) > maxName || len(h.Program) > maxName:
		return fmt.Sprintf("name and program must be at most %d bytes", maxName)
	case printable(h.Name) == "":
		return "the hello carries no name"
	case len(h.Candidates) > wire.MaxCandidates:
		return "too many candidates"
	case len(h.Sessions) > wire.MaxHeld:
		return fmt.Sprintf("more than %d sessions", wire.MaxHeld)
	}
	for _, held := range h.Sessions {
		if why := checkHeld(held); why != "" {
			return why
		}
	}
	h.Name, h.Program = printable(h.Name), printable(h.Program)
	h.Candidates, h.Mapping = usable(h.Candidates), sane(h.Mapping)
	return ""
}

func checkHeld(h wire.Held) string {
	if !sessionID.MatchString(h.Session) {
		return "a session's id is not one"
	}
	if len(h.Addresses) > maxHeldAddrs || len(h.Rules) > maxHeldRules {
		return "a session has too many addresses or rules"
	}
	for _, r := range h.Rules {
		if len(r) > maxRule {
			return fmt.Sprintf("a rule's name is longer than %d bytes", maxRule)
		}
	}
	return ""
}

// usable keeps the candidates at which a gateway may be reached at all, of the kinds that a side may name.
func usable(list []wire.Candidate) []wire.Candidate {
	out := make([]wire.Candidate, 0, min(len(list), wire.MaxCandidates))
	for _, c := range list {
		a := c.Addr.Addr()
		if len(out) < wire.MaxCandidates && c.Kind.Valid() && c.Addr.IsValid() && c.Addr.Port() != 0 && a.Zone() == "" &&
			!a.IsUnspecified() && !a.IsMulticast() {
			out = append(out, c)
		}
	}
	return out
}

// sane gives a mapping that we know, or that it is unknown.
func sane(m wire.Mapping) wire.Mapping {
	if m.Valid() {
		return m
	}
	return wire.MappingUnknown
}
