//go:build unix && !linux

package lab

import (
	"net/netip"
	"os"
	"syscall"
)

// Off Linux there are flat labs alone. What they never touch stands here so that the rest compiles.

type namespace struct{}

func newNamespace() (*namespace, error)                             { return nil, errLinux }
func (*namespace) sysctl(string, string) error                      { return errLinux }
func (*namespace) do(func() error) error                            { return errLinux }
func (*namespace) onKeeper(func() error) error                      { return errLinux }
func (*namespace) path() string                                     { return "" }
func (*namespace) close()                                           {}
func killStrays([]*namespace) error                                 { return nil }
func dieWithThread(*syscall.SysProcAttr)                            {}
func (*NAT) attach(*namespace, HostOptions) (address, error)        { return address{}, errLinux }
func (*Net) attach(*namespace, string, Link, bool) (address, error) { return address{}, errLinux }

type wire struct{}

func (*wire) close() error { return nil }

// NAT cannot be built off Linux.
type NAT struct{}

// Public is never asked for.
func (*NAT) Public() netip.Addr { return netip.Addr{} }

// Kind is what stands between a private network and the internet.
type Kind struct{}

// Is is never asked of two that differ.
func (Kind) Is(Kind) bool { return false }

// The kinds, for what names them.
var Open, FullCone, Restricted, Easy, Hard, CarrierGrade, NoUDP, OnlyHTTPS, OnlyProxy Kind

// NATOptions describe a NAT.
type NATOptions struct {
	Kind Kind
	Link Link
	IPv6 bool
	LAN  netip.Prefix
}

// NAT attaches a NAT to the internet; it fails off Linux.
func (n *Net) NAT(string, NATOptions) (*NAT, error) { return nil, errLinux }

func dropPrivileges(attr *syscall.SysProcAttr, _ bool) {
	if os.Getuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: UnprivilegedID, Gid: UnprivilegedID}
	}
}
