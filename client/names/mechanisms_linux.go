package names

import "context"

// mechanisms, in the order in which they are tried; all that work are used.
var mechanisms = []func(context.Context, Options, *scope, func(string) bool) (mechanism, error){startResolved, startRedirect}
