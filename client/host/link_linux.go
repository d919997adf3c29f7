package host

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/client/nft"
	"github.com/culvertnet/culvert/internal/problem"
)

const (
	tunPath = "/dev/net/tun"
	// numbered makes the kernel choose the next free number, in one step with making the device.
	numbered = "culvert%d"
	// exclusive is IFF_TUN_EXCL of linux/if_tun.h: never attach to a device that is there already, because a persistent one
	// would outlive the process.
	exclusive = 0x8000
	// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
	addrGenNone = 1
)

// link is the interface towards the kernel. The kernel is asked anew for each change, so that it does not matter who else
// changed something in between.
type link struct {
	name string
	dev  *device // nil for an interface that somebody else has made
	log  *slog.Logger

	mu      sync.Mutex
	nl      *netlink.Handle // of the network namespace in which the link was made; nil once closed
	attrs   netlink.Link
	skipped []netip.Addr
	shield  *nft.Table     // nil where the host has no nftables
	warned  bool           // that routes of IPv6 are skipped
	user    int            // whose it is, 0 for everybody's
	shared  []netip.Prefix // see [Interface.Shared]
	singles []netip.Prefix // see [Interface.Lead]
	routed  []netip.Prefix // by the last setRoutes, singles left out
}

func openLink(opts Options) (*link, error) {
	file, err := openTUN(opts.Name)
	if err != nil {
		return nil, explain(err, opts.Name)
	}
	native, err := tun.CreateTUNFromFile(file, opts.MTU)
	if err != nil {
		_ = file.Close()
		return nil, explain(err, opts.Name)
	}
	l := &link{log: opts.Logger, user: opts.User}
	l.dev = newDevice(native, l.release)
	if l.name, err = l.dev.Name(); err == nil {
		err = l.bringUp()
	}
	if err != nil {
		_ = l.dev.Close()
		return nil, explain(err, l.name)
	}
	return l, nil
}

// adoptLink takes over an interface by its name.
func adoptLink(opts Options) (*link, error) {
	l := &link{log: opts.Logger, user: opts.User, name: opts.Name}
	if err := l.bringUp(); err != nil {
		l.release()
		return nil, explain(err, l.name)
	}
	return l, nil
}

func (l *link) close() error {
	if l.dev != nil {
		return l.dev.Close()
	}
	l.release()
	return nil
}

// openTUN makes the device. It is not tun.CreateTUN because that attaches to an existing device, and leaks the descriptor
// when the name is taken.
func openTUN(name string) (*os.File, error) {
	if name == "" {
		name = numbered
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tunPath, err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | exclusive)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make a tun device: %w", err)
	}
	return os.NewFile(uintptr(fd), tunPath), nil
}

// segments is how many packets the kernel may hand over as one: what one segmentation batch of UDP takes, each with WireGuard's
// 32 bytes and a relay's four, at the full MTU. With more, each would be followed by a batch of the few that are left.
const segments = 44

// bringUp finds the link by its name and sets it up.
func (l *link) bringUp() (err error) {
	if l.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	if l.attrs, err = l.nl.LinkByName(l.name); err != nil {
		return fmt.Errorf("find %s: %w", l.name, err)
	}
	// No link-local address of its own, whose router solicitations would go into the tunnel. Fails where IPv6 is off.
	_ = l.nl.LinkSetIP6AddrGenMode(l.attrs, addrGenNone)
	_ = l.nl.LinkSetGSOMaxSegs(l.attrs, segments)           // costs throughput where it fails, and nothing else
	if l.shield, err = shield(l.name, l.user); err != nil { // before anything can come in
		l.log.Warn("nothing keeps the gateway from opening connections to this host, nor other users of it from the tunnel", "err", err)
	}
	if err := l.nl.LinkSetAlias(l.attrs, aliasPrefix+strconv.Itoa(l.user)); err != nil {
		return fmt.Errorf("say whose %s is: %w", l.name, err)
	}
	loosen(l.name)
	if err := settle(l.nl); err != nil {
		l.log.Warn("another user's tunnel on this host may take what is for this one", "err", err)
	}
	if err := l.nl.LinkSetUp(l.attrs); err != nil {
		return fmt.Errorf("set %s up: %w", l.name, err)
	}
	return nil
}

// release is called when the device has been closed. A reader may hold its descriptor for a moment longer, and with it the
// interface and its routes, which the next tunnel would find taken: so the link is deleted by its index, which the kernel
// never gives again.
func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl != nil {
		if l.attrs != nil {
			_ = l.nl.LinkDel(l.attrs) // fails where it is gone already
			_ = settle(l.nl)          // as the next tunnel would
		}
		l.nl.Close()
		l.nl = nil
	}
	if l.shield != nil { // last: until then something may come in
		_ = l.shield.Close()
		l.shield = nil
	}
}

func (l *link) device() tun.Device {
	if l.dev == nil {
		return nil
	}
	return l.dev
}

func (l *link) skippedAddresses() []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.skipped)
}

// explain turns what the kernel said into a problem.
func explain(err error, name string) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return problem.Wrap(err, problem.NeedsPrivilege, "making a network interface needs root or CAP_NET_ADMIN",
			"run the command with sudo -E (plain sudo drops what the job needs to ask for a token), or use --mode proxy, which needs no privilege")
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return problem.Wrap(err, problem.Unsupported, "this host has no TUN driver at "+tunPath,
			"load it with `modprobe tun`, or use --mode proxy, which needs none")
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("there is a network interface %s already", name),
			"give another name, or none for the next free one")
	}
	return problem.Wrap(err, problem.Failed, fmt.Sprintf("making a network interface failed: %v", err),
		"use --mode proxy, which needs none")
}

// privileged asks the kernel without changing anything: the right to change links is checked before whether the link exists,
// and none has the highest index.
func privileged() bool {
	file, err := os.OpenFile(tunPath, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = file.Close()
	err = netlink.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: math.MaxInt32}})
	return errors.Is(err, unix.ENODEV)
}

// setMTU is [Interface.SetMTU].
func (l *link) setMTU(mtu int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl == nil {
		return closed(l.name)
	}
	if err := l.nl.LinkSetMTU(l.attrs, mtu); err != nil {
		return fmt.Errorf("set the mtu of %s to %d: %w", l.name, mtu, err)
	}
	return nil
}

// setAddresses is [Interface.SetAddresses].
func (l *link) setAddresses(addrs []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl == nil {
		return closed(l.name)
	}
	have, err := l.addresses()
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", l.name, err)
	}
	want := make(map[netip.Addr]bool)
	l.skipped = nil
	var errs []error
	for _, addr := range addrs {
		addr = addr.Unmap().WithZone("")
		if want[addr] || !addr.IsValid() {
			continue
		}
		want[addr] = true
		if !have[addr] {
			errs = append(errs, l.addAddress(addr))
		}
	}
	for addr := range have {
		if want[addr] {
			continue
		}
		if err := l.nl.AddrDel(l.attrs, single(addr)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("remove address %s from %s: %w", addr, l.name, err))
		}
	}
	return l.failed(errs)
}

func (l *link) addAddress(addr netip.Addr) error {
	err := l.nl.AddrAdd(l.attrs, single(addr))
	switch {
	case err == nil || errors.Is(err, unix.EEXIST):
		return nil
	case addr.Is6() && noIPv6(err):
		l.skipped = append(l.skipped, addr)
		l.log.Info("this host has IPv6 switched off, the address is skipped", "addr", addr, "err", err)
		return nil
	}
	return fmt.Errorf("add address %s to %s: %w", addr, l.name, err)
}

// addresses lists what the interface has, other than what the kernel gave it on its own.
func (l *link) addresses() (map[netip.Addr]bool, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return l.nl.AddrList(l.attrs, netlink.FAMILY_ALL) })
	have := make(map[netip.Addr]bool)
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && !addr.Unmap().IsLinkLocalUnicast() {
			have[addr.Unmap()] = true
		}
	}
	return have, err
}

// single is an address alone, without a subnet. Nobody else can have it, so that IPv6 need not look for duplicates first.
func single(addr netip.Addr) *netlink.Addr {
	bits := addr.BitLen()
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, bits)}}
	if addr.Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// noIPv6 reports whether the kernel refused because IPv6 is switched off: EACCES for the sysctl disable_ipv6, the others for
// a kernel without IPv6 or booted with ipv6.disable=1.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) ||
		errors.Is(err, unix.EPROTONOSUPPORT)
}

// dump repeats a listing that was interrupted by a change, whose result may miss entries.
func dump[T any](list func() (T, error)) (T, error) {
	const tries = 16
	for try := 1; ; try++ {
		result, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == tries {
			return result, err
		}
	}
}

// failed joins what went wrong. A device that is gone, because it is being closed or somebody removed it, is one cause for all.
func (l *link) failed(errs []error) error {
	err := errors.Join(errs...)
	if errors.Is(err, unix.ENODEV) {
		return closed(l.name)
	}
	return err
}

func closed(name string) error {
	return problem.Wrap(net.ErrClosed, problem.NotUp, "the network interface "+name+" is gone", "bring the tunnel up again")
}
