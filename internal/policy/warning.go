package policy

import (
	"maps"
	"slices"
)

// Code names one kind of warning. Codes are part of the configuration's format: they are added to, never renamed.
type Code string

// warnings say what each is about.
var warnings = map[Code]string{}

// codes lists all of them.
func codes() []string {
	var all []string
	for _, c := range slices.Sorted(maps.Keys(warnings)) {
		all = append(all, string(c))
	}
	return all
}
