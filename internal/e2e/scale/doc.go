// Package scale holds real coordinators against many jobs, against strangers and against the death of their neighbours. It has no
// code besides its tests.
package scale
