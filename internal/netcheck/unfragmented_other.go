//go:build !linux && !darwin && !windows

package netcheck

import "errors"

func dontFragment(uintptr, bool) error { return errors.New("not known how on this system") }
