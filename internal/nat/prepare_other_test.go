//go:build !linux

package nat

func prepare() {}
