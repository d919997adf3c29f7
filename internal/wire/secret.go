package wire

import (
	"fmt"
	"log/slog"
)

// Secret is a token, a session secret or a ticket: it crosses the API as a plain string and prints as a
// placeholder everywhere else.
type Secret string

// Reveal gives the secret itself.
func (s Secret) Reveal() string { return string(s) }

// String never shows the secret.
func (Secret) String() string { return "(secret)" }

// Format never shows the secret, whatever the verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(secret)")) }

// LogValue never shows the secret.
func (Secret) LogValue() slog.Value { return slog.StringValue("(secret)") }
