//go:build !linux

package lab

import "errors"

var errLinux = errors.New("a network lab needs Linux's network namespaces")

// Enter makes this process able to build labs; there are none off Linux.
func Enter() error { return errLinux }

// EnterThen is [Enter] for a program that has something to tidy up.
func EnterThen(func()) error { return errLinux }

// Available reports why this process cannot build a lab.
func Available() error { return errLinux }

// TUN reports why programs on a lab's hosts cannot make TUN devices.
func TUN() error { return errLinux }
