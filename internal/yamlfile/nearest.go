package yamlfile

import "strings"

// maxCompared bounds what distance compares, in bytes, so that a long key costs nothing.
const maxCompared = 64

// Nearest gives the name that a misspelt word most likely means, or "" where none is near: two edits at most, one for
// words of up to four letters. Upper and lower case count as equal, '-' and '_' as one edit. Names are tried in order.
func Nearest(word string, names []string) string {
	limit := 2
	if len(word) <= 4 {
		limit = 1
	}
	best, bestAt := "", limit+1
	for _, name := range names {
		if d := distance(strings.ToLower(word), strings.ToLower(name)); d < bestAt {
			best, bestAt = name, d
		}
	}
	return best
}

// distance is the optimal string alignment distance in bytes: insertions, deletions, substitutions and swapped
// neighbours cost one each. Words over [maxCompared] are infinitely far.
func distance(a, b string) int {
	if len(a) > maxCompared || len(b) > maxCompared {
		return maxCompared
	}
	var before, last, row [maxCompared + 1]int
	for j := range len(b) + 1 {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
