package claimstest

import (
	"crypto/rand"
	"crypto/subtle"
	"net/http"
	"strings"
)

// Job is one job that may ask for tokens.
type Job struct {
	RequestURL   string // for ACTIONS_ID_TOKEN_REQUEST_URL; has a query already
	RequestToken string // for ACTIONS_ID_TOKEN_REQUEST_TOKEN
}

// Getenv gives the job's environment as a runner sets it, for functions that take os.Getenv.
func (j Job) Getenv(name string) string {
	switch name {
	case "ACTIONS_ID_TOKEN_REQUEST_URL":
		return j.RequestURL
	case "ACTIONS_ID_TOKEN_REQUEST_TOKEN":
		return j.RequestToken
	}
	return ""
}

// AddJob registers a job: tokens that it asks for carry these claims over GitHub's usual ones.
func (i *Issuer) AddJob(claims map[string]any) Job {
	id, bearer := rand.Text(), rand.Text()+rand.Text()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.jobs[id] = job{bearer: bearer, claims: claims}
	return Job{
		RequestURL:   strings.TrimSuffix(i.url, "/") + "/request/" + id + "/idtoken?api-version=2.0",
		RequestToken: bearer,
	}
}

// serveRequest answers a runner's request for a token.
func (i *Issuer) serveRequest(w http.ResponseWriter, r *http.Request, path string) {
	id, found := strings.CutSuffix(path, "/idtoken")
	i.mu.Lock()
	asking, known := i.jobs[id]
	i.mu.Unlock()
	query := r.URL.Query()
	bearer := "Bearer " + asking.bearer
	switch {
	case !found || !known:
		http.NotFound(w, r)
	case r.Method != http.MethodGet:
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	case subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte(bearer)) != 1:
		http.Error(w, "unauthorized", http.StatusUnauthorized)
	case query.Get("api-version") != "2.0" || len(query["audience"]) > 1:
		http.Error(w, "bad request", http.StatusBadRequest)
	case foreign(query.Get("audience"), asking.claims):
		http.Error(w, "forbidden", http.StatusForbidden)
	default:
		token := i.Sign(query.Get("audience"), asking.claims)
		answer(w, map[string]any{"count": len(token), "value": token})
	}
}

// foreign reports whether GitHub would refuse the audience: one that contains github.com and is not the owner's own.
func foreign(audience string, claims map[string]any) bool {
	return strings.Contains(audience, "github.com") && audience != ownAudience(claims)
}

// ownAudience is the audience of a token that was asked for without one.
func ownAudience(claims map[string]any) string {
	owner, _ := withDefaults(claims)["repository_owner"].(string)
	return "https://github.com/" + owner
}
