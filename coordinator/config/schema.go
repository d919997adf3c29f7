package config

import "embed"

// schemas are generated from the structs that the files are read into, so that editors know what the programs know:
// go test ./coordinator/config -run TestSchemaIsCurrent -update
//
//go:embed schema/*.json
var schemas embed.FS

// Schema gives the JSON Schema (draft 2020-12) of a file: "config" for culvert.yaml, "policy" for a gateway's own policy and
// for files that culvert.yaml includes, "cases" for what `policy test` takes, "relay" for relay.yaml.
func Schema(file string) ([]byte, bool) {
	data, err := schemas.ReadFile("schema/" + file + ".json")
	return data, err == nil
}
