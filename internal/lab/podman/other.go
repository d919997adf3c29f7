//go:build !linux

// Package podman builds a Dockerfile's images and runs them on hosts of a lab; it needs Linux.
package podman

// Engine is not to be had off Linux.
type Engine struct{}
