// Package downloads serves the files of releases to runners that cannot reach GitHub. Nobody has to trust what it serves: the action
// pins the digest of each client.
package downloads

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path"
	"regexp"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// Path is the route below which files are: /dl/v1.2.3/culvert-linux-amd64.gz.
const Path = "/dl/{release}/{file}"

// Bounds on what a stranger may have done.
const (
	MaxSize     = 64 << 20        // bytes of one file; what is larger is not there
	MaxAtOnce   = 64              // downloads in progress; more are told to come back
	MaxEach     = MaxAtOnce / 4   // of these from one address, so that nobody who reads slowly keeps all others out
	Patience    = 2 * time.Minute // for one download in all
	maxDigests  = 256             // files whose digest is remembered
	cacheFor    = "public, max-age=3600"
	contentType = "application/gzip"
)

// Names that are served: those that a release has, and no other whatever lies in the folder.
var (
	release = regexp.MustCompile(`^v\d{1,6}\.\d{1,6}\.\d{1,6}(-[0-9A-Za-z.]{1,32})?$`)
	file    = regexp.MustCompile(`^(culvert-(linux|darwin|windows)-(amd64|arm64)\.gz|culvert-(coordinator|gateway)-linux-(amd64|arm64)\.tar\.gz)$`)
)

// Handler serves the files of a folder that has a folder for each release.
type Handler struct {
	dir func() string // "": nothing is served
	log *slog.Logger

	mu      sync.Mutex
	busy    int // downloads in progress
	digests map[identity]string
	sources map[netip.Prefix]int // downloads in progress, by who asked
}

// identity is what a file's digest holds for.
type identity struct {
	name     string
	size     int64
	modified time.Time
}

// New makes a handler for the folder that dir gives at the time of a request, so that a reload may change it.
func New(dir func() string, log *slog.Logger) *Handler {
	return &Handler{dir: dir, log: log, digests: map[identity]string{}, sources: map[netip.Prefix]int{}}
}

// Serve sends one file of one release to a source. Its problems are not-found and unreachable (503, try again).
func (h *Handler) Serve(w http.ResponseWriter, r *http.Request, source netip.Prefix, releaseName, fileName string) error {
	dir := h.dir()
	if dir == "" || !release.MatchString(releaseName) || !file.MatchString(fileName) {
		return missing()
	}
	if !h.take(source) {
		return problem.New(problem.Unreachable, "too many downloads at once", "try again in a few seconds")
	}
	defer h.give(source)
	f, info, err := open(dir, path.Join(releaseName, fileName))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			h.log.Warn("a release's file is not served", "path", path.Join(releaseName, fileName), "err", err)
		}
		return missing()
	}
	defer f.Close()
	sum, err := h.digest(f, info, path.Join(releaseName, fileName))
	if err != nil {
		return fmt.Errorf("read a release's file: %w", err)
	}
	// Longer than an answer of the API may take, and not for ever; a listener that knows no deadlines has none of its own either.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(Patience))
	head := w.Header()
	head.Set("Content-Type", contentType)
	head.Set("Content-Disposition", "attachment")
	head.Set("Cache-Control", cacheFor)
	head.Set("ETag", `"`+sum+`"`)
	http.ServeContent(w, r, fileName, info.ModTime(), f)
	return nil
}

// take counts a download in, if it may begin.
func (h *Handler) take(source netip.Prefix) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy >= MaxAtOnce || h.sources[source] >= MaxEach {
		return false
	}
	h.busy++
	h.sources[source]++
	return true
}

func (h *Handler) give(source netip.Prefix) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy--
	if h.sources[source]--; h.sources[source] == 0 {
		delete(h.sources, source)
	}
}

func missing() error {
	return problem.New(problem.NotFound, "no such download", "see which releases the coordinator's downloads folder holds")
}

// open opens a regular file of a bearable size, wherever links inside the folder lead within it.
func open(dir, name string) (*os.File, fs.FileInfo, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	// What it is comes first: opening a pipe would wait for a writer.
	info, err := root.Stat(name)
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxSize {
		return nil, nil, fmt.Errorf("it is no file of at most %d bytes", MaxSize)
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, nil, err
	}
	return f, info, nil
}

// digest gives the SHA-256 of an open file, in hexadecimal, and leaves it at its start.
func (h *Handler) digest(f *os.File, info fs.FileInfo, name string) (string, error) {
	id := identity{name, info.Size(), info.ModTime()}
	h.mu.Lock()
	sum, known := h.digests[id]
	h.mu.Unlock()
	if known {
		return sum, nil
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.LimitReader(f, MaxSize)); err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	sum = hex.EncodeToString(hash.Sum(nil))
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.digests) >= maxDigests {
		clear(h.digests)
	}
	h.digests[id] = sum
	return sum, nil
}
