//go:build linux

// Command rawwg is the baseline of the benchmarks: wireguard-go between two TUN devices and nothing else. It makes an
// interface, configures it from standard input in WireGuard's own protocol and runs until it is killed.
//
//	rawwg NAME ADDRESS/BITS [ROUTE…] < configuration
package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

const mtu = 1420

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: rawwg NAME ADDRESS/BITS [ROUTE…] < configuration")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, "rawwg:", err)
		os.Exit(1)
	}
}

func run(name, address string, routes []string) error {
	config, err := io.ReadAll(os.Stdin)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	dev, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	wg := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, "rawwg: "))
	if err := wg.IpcSet(string(config)); err != nil {
		return fmt.Errorf("configure %s: %w", name, err)
	}
	if err := wg.Up(); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	if err := addresses(name, address, routes); err != nil {
		return err
	}
	fmt.Println("up")
	for {
		time.Sleep(time.Hour)
	}
}

func addresses(name, address string, routes []string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("give %s to %s: %w", address, name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	for _, route := range routes {
		dst, err := netlink.ParseIPNet(route)
		if err != nil {
			return fmt.Errorf("route %q: %w", route, err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst}); err != nil {
			return fmt.Errorf("route %s into %s: %w", route, name, err)
		}
	}
	return nil
}
