package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// Paths of the log on the private listener. It is read there and nowhere else.
const (
	PathRecords = "/v1/audit"        // GET: records as JSON lines; parameters of [ParseFilter], last=N, follow=true
	PathExport  = "/v1/audit/export" // GET: records and seals of since to until, and the signed end
	PathVerify  = "/v1/audit/verify" // GET: [Report]; record=N&hash=H asks whether that record is there too
	PathKey     = "/v1/audit/key"    // GET: {"key": …}, the public key
)

// MediaLines is the media type of records.
const MediaLines = "application/x-ndjson"

const (
	maxReaders   = 8                // of the log at once
	readerWrite  = 30 * time.Second // for a line to leave
	maxNewest    = 100_000          // what last=N may ask for
	verifyBudget = 30 * time.Minute
)

// handler serves the log to operators.
type handler struct {
	reader *Reader
	slots  chan struct{}
}

// Handler serves the log over HTTP. Who may ask is for its caller to decide.
func (r *Reader) Handler() http.Handler {
	h := &handler{r, make(chan struct{}, maxReaders)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+PathRecords, h.limited(h.records))
	mux.HandleFunc("GET "+PathExport, h.limited(h.export))
	mux.HandleFunc("GET "+PathVerify, h.limited(h.verify))
	mux.HandleFunc("GET "+PathKey, h.limited(h.key))
	return mux
}

// limited bounds how many read the log at once: it is read from the same disk that joins wait for.
func (h *handler) limited(serve func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
		default:
			problem.Write(w, problem.New(problem.RateLimited, "too many read the audit log at once", "try again when another reader has ended"))
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := serve(w, r); err != nil {
			problem.Write(w, err)
		}
	}
}

// lines writes JSON lines as they come.
type lines struct {
	w   http.ResponseWriter
	ctl *http.ResponseController
	err error
}

func newLines(w http.ResponseWriter) *lines {
	w.Header().Set("Content-Type", MediaLines)
	return &lines{w: w, ctl: http.NewResponseController(w)}
}

// Write passes bytes on and gives a slow reader a while for each.
func (l *lines) Write(p []byte) (int, error) {
	_ = l.ctl.SetWriteDeadline(time.Now().Add(readerWrite)) // unsupported in a recorder, which is never slow
	return l.w.Write(p)
}

func (l *lines) line(text []byte) bool {
	if _, l.err = l.Write(append(text[:len(text):len(text)], '\n')); l.err == nil {
		_ = l.ctl.Flush()
	}
	return l.err == nil
}

func (h *handler) records(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	f, err := ParseFilter(q, h.reader.now())
	if err != nil {
		return err
	}
	newest := 0
	if s := q.Get("last"); s != "" {
		if newest, err = strconv.Atoi(s); err != nil || newest < 1 || newest > maxNewest {
			return problem.New(problem.BadRequest, fmt.Sprintf("last=%.20q is no number up to %d", s, maxNewest), "write it like last=100")
		}
	}
	out := newLines(w)
	return h.streamed(w, h.reader.Tail(r.Context(), f, newest, q.Get("follow") == "true", out.line))
}

func (h *handler) export(w http.ResponseWriter, r *http.Request) error {
	f, err := ParseFilter(r.URL.Query(), h.reader.now())
	if err != nil {
		return err
	}
	return h.streamed(w, h.reader.Export(r.Context(), newLines(w), f.Since, f.Until))
}

// streamed ends an answer that has begun: the only way to say that it is not whole is to break it off.
func (h *handler) streamed(_ http.ResponseWriter, err error) error {
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

func (h *handler) verify(w http.ResponseWriter, r *http.Request) error {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(verifyBudget))
	anchor, err := parseAnchor(r.URL.Query())
	if err != nil {
		return err
	}
	report, err := h.reader.Verify(r.Context(), anchor)
	if err != nil {
		return problem.Wrap(err, problem.Unreachable, "the audit log cannot be read", "look at the coordinator's log")
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(report) // the reader has gone
	return nil
}

func parseAnchor(q url.Values) (Anchor, error) {
	a := Anchor{Hash: q.Get("hash")}
	if s := q.Get("record"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil || a.Hash == "" {
			return a, problem.New(problem.BadRequest, "record and hash do not name a record", "give both, as an export's end has them")
		}
		a.Record = n
	}
	return a, nil
}

func (h *handler) key(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/json")
	keys := make([]string, 0, len(h.reader.Keys))
	for _, k := range h.reader.Keys {
		keys = append(keys, PublicKey(k))
	}
	_ = json.NewEncoder(w).Encode(map[string][]string{"keys": keys}) // the reader has gone
	return nil
}

// Remote reads the log of a running coordinator through its private listener.
type Remote struct {
	Client *http.Client
	URL    string // base URL of the listener
	Secret string // bearer secret; "" over its socket
}

// get asks for one path. The caller closes the body.
func (c *Remote) get(ctx context.Context, path string, q url.Values) (*http.Response, error) {
	u := strings.TrimRight(c.URL, "/") + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, err
	}
	if c.Secret != "" {
		req.Header.Set("Authorization", "Bearer "+c.Secret)
	}
	resp, err := c.Client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, problem.Read(resp)
	}
	return resp, nil
}
