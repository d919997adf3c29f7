package api

import (
	_ "embed"
	"net/http"
)

// openAPI describes this API (OpenAPI 3.1). A test makes it of the wire's types and holds it against the handlers; docs has a copy.
//
//go:embed openapi.json
var openAPI []byte

// document is GET /openapi.json.
func (a *API) document(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(openAPI) // the client has gone; nothing is left to tell it
}
