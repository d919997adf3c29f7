package config

import (
	"encoding/hex"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Where the audit log's copy may go beside a file.
const (
	AuditStdout = "stdout"
	AuditOff    = "off"
)

// What holds for the audit log where the file is silent, and what it may say.
const (
	DefaultAuditKeep = 90 * 24 * time.Hour
	DefaultAuditSize = 10 << 30
	MinAuditKeep     = time.Hour
	MinAuditSize     = 64 << 20
)

// Audit says how long the audit log is kept and where it goes besides.
type Audit struct {
	Copy       string        // [AuditStdout], [AuditOff] or a file: every record once more, a line of JSON each
	Keep       time.Duration // by age
	MaxSize    int64         // by size, bytes
	KeyFile    string        // PEM with the Ed25519 key that signs; "": one that the state keeps
	FormerKeys []string      // public keys that signed before
}

// Private is the listener for operators: metrics, health, profiles and the audit log.
type Private struct {
	Listen       string   // TCP address; "": only the socket in the state's folder, where there is one
	SecretSHA256 [32]byte // of the bearer secret for profiles and audit log over TCP; zero: they are served on the socket alone
}

// SocketName is the private listener's socket in the state's folder.
const SocketName = "private.sock"

// Socket gives the path of the private listener's socket, "" where state has no folder.
func (c *Config) Socket() string {
	if c.State.Dir == "" {
		return ""
	}
	return filepath.Join(c.State.Dir, SocketName)
}

type auditDoc struct {
	// Log is where every record goes once more, as a line of JSON: stdout (the default), off, or a file, with a slash or a dot in its path.
	Log string `yaml:"log"`
	// Keep is how long records are kept, such as 90d or 720h; default 90d.
	Keep string `yaml:"keep"`
	// MaxSize is how large the log may get before its oldest part goes, such as 10GiB, which is the default.
	MaxSize string `yaml:"max_size"`
	// Key is a PEM file with the Ed25519 key that signs the log; without it one lies in the state.
	Key string `yaml:"key"`
	// FormerKeys are public keys that signed before.
	FormerKeys []string `yaml:"former_keys"`
}

type privateDoc struct {
	// Listen is a TCP address for metrics and health, such as 127.0.0.1:9090; without it only the socket in state.dir is served.
	Listen string `yaml:"listen"`
	// SecretSHA256 is the SHA-256 of the bearer secret that opens profiles and audit log over TCP.
	SecretSHA256 string `yaml:"secret_sha256"`
}

func (r *reader) audit(d auditDoc) Audit {
	a := Audit{Copy: AuditStdout, Keep: DefaultAuditKeep, MaxSize: DefaultAuditSize, KeyFile: r.path(d.Key), FormerKeys: d.FormerKeys}
	switch d.Log {
	case "", AuditStdout:
	case AuditOff:
		a.Copy = AuditOff
	default:
		if a.Copy = r.path(d.Log); !strings.ContainsAny(d.Log, `/\.`) {
			r.fail("$.audit.log", strconv.Quote(d.Log)+" is neither stdout nor off nor the path of a file", nextLog(d.Log))
		}
	}
	if d.Keep != "" {
		if a.Keep = parseAge(d.Keep); a.Keep < MinAuditKeep {
			r.fail("$.audit.keep", strconv.Quote(d.Keep)+" is no time of at least an hour", "write it like 90d or 720h")
		}
	}
	if d.MaxSize != "" {
		if a.MaxSize = parseSize(d.MaxSize); a.MaxSize < MinAuditSize {
			r.fail("$.audit.max_size", strconv.Quote(d.MaxSize)+" is no size of at least 64MiB", "write it like 10GiB")
		}
	}
	return a
}

// nextLog is the next step where the log is one word, which makes a file of that name only where that is meant.
func nextLog(word string) string {
	if near := yamlfile.Nearest(word, []string{AuditStdout, AuditOff}); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return "write a file of that name as ./" + word
}

// parseAge reads a duration in Go's notation or in days; 0 where it is none.
func parseAge(s string) time.Duration {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0
		}
		return time.Duration(n) * 24 * time.Hour
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0
	}
	return d
}

// parseSize reads a number of MiB, GiB or TiB; 0 where it is none.
func parseSize(s string) int64 {
	for unit, bits := range map[string]int{"MiB": 20, "GiB": 30, "TiB": 40} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 32)
			if err != nil || n < 0 || n > math.MaxInt64>>bits {
				return 0
			}
			return n << bits
		}
	}
	return 0
}

// private reads the listener for operators; public is the other one's address.
func (r *reader) private(d privateDoc, public string) Private {
	p := Private{Listen: r.address("$.private.listen", d.Listen, "")}
	if d.SecretSHA256 != "" {
		sum, err := hex.DecodeString(d.SecretSHA256)
		if err != nil || len(sum) != len(p.SecretSHA256) {
			r.fail("$.private.secret_sha256", "not a SHA-256 in hexadecimal", "write the 64 digits of: tr -d '\\n' < SECRET-FILE | sha256sum")
			return p
		}
		p.SecretSHA256 = [32]byte(sum)
		if p.Listen == "" {
			r.fail("$.private", "a secret without a listener guards nothing", "add listen, such as 127.0.0.1:9090, or remove secret_sha256")
		}
	}
	if p.Listen != "" && p.Listen == public && !strings.HasSuffix(public, ":0") {
		r.fail("$.private.listen", p.Listen+" is the public listener's address", "give the private listener one of its own")
	}
	return p
}
