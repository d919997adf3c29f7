package policy

import "slices"

// mergePorts sorts ranges and joins those that overlap or touch.
func mergePorts(ranges []portRange) []portRange {
	slices.SortFunc(ranges, func(a, b portRange) int { return int(a.lo) - int(b.lo) })
	var out []portRange
	for _, r := range ranges {
		if n := len(out); n > 0 && int(r.lo) <= int(out[n-1].hi)+1 {
			out[n-1].hi = max(out[n-1].hi, r.hi)
			continue
		}
		out = append(out, r)
	}
	return out
}

// portsMeet tells whether two sorted lists share a port.
func portsMeet(a, b []portRange) bool {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].hi < b[0].lo:
			a = a[1:]
		case b[0].hi < a[0].lo:
			b = b[1:]
		default:
			return true
		}
	}
	return false
}

// hasPort looks a port up in a sorted list.
func hasPort(ranges []portRange, port uint16) bool {
	for _, r := range ranges {
		if port < r.lo {
			return false
		}
		if port <= r.hi {
			return true
		}
	}
	return false
}
