package relay

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Side is one end of a session.
type Side uint8

// The two sides.
const (
	Client  Side = 0
	Gateway Side = 1
)

// Other gives the opposite side.
func (s Side) Other() Side { return s ^ 1 }

// String gives the side's name.
func (s Side) String() string {
	if s == Client {
		return "client"
	}
	return "gateway"
}

// Claims are what a ticket says. Times are kept to the second.
type Claims struct {
	Session string // the session's id
	Side    Side
	Key     wire.Key // that side's WireGuard key: only its holder can use the ticket
	Issued  time.Time
	Expires time.Time
	Rate    uint64 // what the relay forwards from this side, in bytes a second; 0 leaves it to the relay
}

// Ticket is an encoded ticket as it stands in a [Bind]. It is no secret towards the relay, but like a secret it never
// belongs into a log.
type Ticket []byte

// Layout of a ticket: version, side, session, key, issued, expires, rate, all big endian, and the signature over
// ticketDomain and what stands before it.
const (
	ticketVersion = 1
	claimsSize    = 1 + 1 + SessionSize + wire.KeySize + 8 + 8 + 8

	// TicketSize is the size of a [Ticket] in bytes.
	TicketSize = claimsSize + ed25519.SignatureSize

	// ClockSkew is how far a coordinator's clock may be ahead of a relay's.
	ClockSkew = time.Minute
)

// ticketDomain keeps a signature from meaning anything elsewhere. Its zero byte ends it.
const ticketDomain = "culvert relay ticket v1\x00"

// ErrTicket is what [Verify] gives for every ticket that it refuses.
var ErrTicket = errors.New("the relay ticket is refused")

// Sign makes a ticket, in base64url. It fails for claims that no relay would take.
func Sign(key ed25519.PrivateKey, c Claims) (wire.Secret, error) {
	session, err := ParseSession(c.Session)
	switch {
	case err != nil:
		return "", fmt.Errorf("sign a relay ticket: %w", err)
	case c.Side > Gateway:
		return "", fmt.Errorf("sign a relay ticket: there is no side %d", c.Side)
	case c.Key.IsZero():
		return "", errors.New("sign a relay ticket: the side's key is missing")
	case c.Issued.Unix() < 0 || !c.Expires.After(c.Issued):
		return "", errors.New("sign a relay ticket: it ends before it begins")
	case len(key) != ed25519.PrivateKeySize:
		return "", errors.New("sign a relay ticket: the signing key is missing")
	}
	t := append(make([]byte, 0, len(ticketDomain)+TicketSize), ticketDomain...)
	t = append(t, ticketVersion, byte(c.Side))
	t = append(t, session[:]...)
	t = append(t, c.Key[:]...)
	t = binary.BigEndian.AppendUint64(t, uint64(c.Issued.Unix()))
	t = binary.BigEndian.AppendUint64(t, uint64(c.Expires.Unix()))
	t = binary.BigEndian.AppendUint64(t, c.Rate)
	t = append(t, ed25519.Sign(key, t)...)
	return wire.Secret(base64.RawURLEncoding.EncodeToString(t[len(ticketDomain):])), nil
}

// DecodeTicket gives a ticket's bytes. It verifies nothing: that is the relay's business.
func DecodeTicket(s wire.Secret) (Ticket, error) {
	if len(s) != base64.RawURLEncoding.EncodedLen(TicketSize) {
		return nil, fmt.Errorf("a relay ticket has %d characters, this one has %d", base64.RawURLEncoding.EncodedLen(TicketSize), len(s))
	}
	t, err := base64.RawURLEncoding.Strict().DecodeString(s.Reveal())
	if err != nil {
		return nil, errors.New("a relay ticket is base64url") // the decoder's error would quote it
	}
	return t, nil
}

// Verify checks a ticket's signature under any of keys, and that it is valid now. Its error is [ErrTicket] or wraps it.
func Verify(t Ticket, keys []ed25519.PublicKey, now time.Time) (Claims, error) {
	if len(t) != TicketSize || t[0] != ticketVersion || t[1] > byte(Gateway) {
		return Claims{}, ErrTicket
	}
	if !signed(t, keys) {
		return Claims{}, fmt.Errorf("%w: not signed by a known coordinator", ErrTicket)
	}
	c := readClaims(t)
	switch {
	case now.Add(ClockSkew).Before(c.Issued):
		return Claims{}, fmt.Errorf("%w: issued in the future", ErrTicket)
	case !now.Before(c.Expires):
		return Claims{}, fmt.Errorf("%w: expired", ErrTicket)
	}
	return c, nil
}

func signed(t Ticket, keys []ed25519.PublicKey) bool {
	var buf [len(ticketDomain) + claimsSize]byte
	copy(buf[:], ticketDomain)
	copy(buf[len(ticketDomain):], t[:claimsSize])
	for _, k := range keys {
		if len(k) == ed25519.PublicKeySize && ed25519.Verify(k, buf[:], t[claimsSize:]) {
			return true
		}
	}
	return false
}

// readClaims reads a ticket of the right size.
func readClaims(t Ticket) Claims {
	r := bytes.NewBuffer(t[1:])
	c := Claims{Side: Side(r.Next(1)[0])}
	c.Session = sessionText([SessionSize]byte(r.Next(SessionSize)))
	c.Key = wire.Key(r.Next(wire.KeySize))
	c.Issued = time.Unix(int64(binary.BigEndian.Uint64(r.Next(8))), 0)
	c.Expires = time.Unix(int64(binary.BigEndian.Uint64(r.Next(8))), 0)
	c.Rate = binary.BigEndian.Uint64(r.Next(8))
	return c
}

// sessionText is a session id in text.
func sessionText(raw [SessionSize]byte) string { return base64.RawURLEncoding.EncodeToString(raw[:]) }
