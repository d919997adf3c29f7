package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newsGroups are the kinds of news that are subscribed to (rtnetlink(7)).
const newsGroups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE

// kernel is netlink: one socket for news, one to ask. Both belong to the network namespace in which they were opened.
type kernel struct {
	skip func(string) bool
	news *os.File
	buf  []byte // of wait
	ask  *netlink.Handle
}

func openSource(opts WatchOptions) (source, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: newsGroups}); err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to news of the network: %w", err), unix.Close(fd))
	}
	k := &kernel{skip: opts.Skip, news: os.NewFile(uintptr(fd), "netlink"), buf: make([]byte, 64<<10)}
	if k.ask, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink: %w", err), k.news.Close())
	}
	return k, nil
}

// wait reads what the kernel tells until something in it may matter. It does not allocate: a host that starts containers
// hears a lot that is none of our business.
func (k *kernel) wait() error {
	for {
		n, err := k.news.Read(k.buf)
		switch {
		case errors.Is(err, os.ErrClosed):
			return err
		case err != nil: // ENOBUFS: some news was lost, so there is some
			return nil
		case matters(k.buf[:n]):
			return nil
		}
	}
}

// matters reports whether a batch of messages may speak of an address, a link or a default route.
func matters(b []byte) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true // not understood
		}
		switch body := b[unix.NLMSG_HDRLEN:size]; binary.NativeEndian.Uint16(b[4:]) {
		case unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWLINK, unix.RTM_DELLINK:
			return true
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			if len(body) > 1 && body[1] == 0 { // struct rtmsg: the destination's length
				return true
			}
		}
		b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return false
}

// close makes wait return.
func (k *kernel) close() {
	_ = k.news.Close()
	k.ask.Close()
}

func (k *kernel) read() (Network, error) {
	links, err := k.ask.LinkList()
	if err != nil {
		return Network{}, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagUp != 0 && a.Flags&(net.FlagLoopback|net.FlagPointToPoint) == 0 && !k.skip(a.Name) {
			names[a.Index] = a.Name
		}
	}
	var n Network
	if n.Addrs, err = k.addrs(names); err != nil {
		return Network{}, err
	}
	if n.Routes, err = k.routes(names); err != nil {
		return Network{}, err
	}
	return n.sorted(), nil
}

func (k *kernel) addrs(names map[int]string) ([]netip.Addr, error) {
	list, err := k.ask.AddrList(nil, unix.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		// An address that is still being checked for duplicates cannot be used; there is news when it can.
		if a.IPNet == nil || names[a.LinkIndex] == "" || a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
			continue
		}
		if addr, ok := usable(a.IPNet); ok {
			out = append(out, addr)
		}
	}
	return out, nil
}

// routes lists the main table's default routes through the interfaces.
func (k *kernel) routes(names map[int]string) ([]DefaultRoute, error) {
	var out []DefaultRoute
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		err := k.ask.RouteListFilteredIter(family, &netlink.Route{}, 0, func(r netlink.Route) bool {
			for _, h := range defaultHops(r) {
				if name := names[h.LinkIndex]; name != "" {
					via, _ := netip.AddrFromSlice(h.Gw)
					out = append(out, DefaultRoute{Iface: name, Via: via.Unmap(), IPv6: family == unix.AF_INET6, Metric: r.Priority})
				}
			}
			return true
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	return out, nil
}

// defaultHops gives the ways that a route offers, none if it is no default route.
func defaultHops(r netlink.Route) []*netlink.NexthopInfo {
	if r.Type != unix.RTN_UNICAST {
		return nil
	}
	if r.Dst != nil {
		if ones, _ := r.Dst.Mask.Size(); ones != 0 {
			return nil
		}
	}
	if len(r.MultiPath) > 0 {
		return r.MultiPath
	}
	return []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw}}
}
