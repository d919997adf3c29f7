//go:build !linux && !darwin

package names

import "context"

// mechanisms: none. On Windows the tunnel is a proxy, which resolves granted names itself.
var mechanisms []func(context.Context, Options, *scope, func(string) bool) (mechanism, error)
