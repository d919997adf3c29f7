// Package e2e holds the end-to-end tests and benchmarks: the three programs as users run them, in network namespaces with
// real NATs. It needs Linux, and root or unprivileged user namespaces.
package e2e
