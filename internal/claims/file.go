package claims

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// settled is how old a file's time stamp must be before an unchanged stamp proves unchanged content: a second write
// within the file system's clock tick leaves no trace in it.
const settled = 2 * time.Second

// fileKeys is the key set of an issuer whose keys lie in a file. The file is looked at for every token, which costs one
// stat; a file that becomes unreadable or wrong leaves the old keys in force.
type fileKeys struct {
	issuer Issuer
	log    *slog.Logger

	mu   sync.Mutex
	ring keyring
	info os.FileInfo // of the file as last looked at; nil after a failure to look
	read time.Time   // when that was
	last string      // the failure that was logged last
}

func newFileKeys(issuer Issuer, log *slog.Logger) (*fileKeys, error) {
	s := &fileKeys{issuer: issuer, log: log}
	if err := s.load(); err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the jwks_file of %s cannot be used: %v", issuer.URL, err),
			"write the issuer's JWK set into the file, as its jwks_uri gives it")
	}
	return s, nil
}

// find implements [source].
func (s *fileKeys) find(_ context.Context, kid string) (keys, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refresh()
	if found, ok := s.ring.find(kid); ok {
		return found, nil
	}
	if kid == "" {
		return nil, invalid(nil, "the token does not say which of the issuer's keys signed it")
	}
	return nil, unknownKey(s.issuer.URL, kid)
}

// prefetch implements [source]; the file has been read already.
func (s *fileKeys) prefetch(context.Context) error { return nil }

// close implements [source].
func (s *fileKeys) close() {}

// refresh reads the file anew if it has changed; mu is held.
func (s *fileKeys) refresh() {
	info, err := os.Stat(s.issuer.JWKSFile)
	if err == nil && s.unchanged(info) {
		return
	}
	if err = s.load(); err == nil {
		s.last = ""
		return
	}
	if text := err.Error(); text != s.last {
		s.last = text
		s.log.Error("a changed jwks_file is not taken up, the old keys stay in force", "issuer", s.issuer.URL, "code", problem.BadConfig, "err", err)
	}
}

func (s *fileKeys) unchanged(info os.FileInfo) bool {
	return s.info != nil && os.SameFile(info, s.info) && info.ModTime().Equal(s.info.ModTime()) && info.Size() == s.info.Size() &&
		s.read.Sub(info.ModTime()) > settled
}

func (s *fileKeys) load() error {
	s.info = nil
	file, err := os.Open(s.issuer.JWKSFile)
	if err != nil {
		return err
	}
	defer file.Close()
	now := time.Now()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	s.info, s.read = info, now
	data, err := io.ReadAll(io.LimitReader(file, maxKeySet+1))
	if err != nil {
		return err
	}
	if len(data) > maxKeySet {
		return fmt.Errorf("it is longer than %d bytes", maxKeySet)
	}
	ring, err := parseKeySet(data)
	if err == nil {
		s.ring = ring
	}
	return err
}
