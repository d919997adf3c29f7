//go:build !linux

package main

func isolated() bool { return false }

func isolate() {}
