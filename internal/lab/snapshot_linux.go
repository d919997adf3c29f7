package lab

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Snapshot lists what a host's kernel holds: interfaces, addresses, routes of every table, rules, tables of nftables and open
// sockets, one a line, sorted. Two snapshots that are equal say that what ran in between left nothing behind.
func (h *Host) Snapshot() ([]string, error) {
	var lines []string
	for _, part := range []func() ([]string, error){h.interfaces, h.routes, h.tables, h.sockets} {
		more, err := part()
		if err != nil {
			return nil, fmt.Errorf("take a snapshot of host %s: %w", h.name, err)
		}
		lines = append(lines, more...)
	}
	slices.Sort(lines)
	return lines, nil
}

func (h *Host) interfaces() ([]string, error) {
	links, err := h.ns.handle.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range links {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("link %s type %s mtu %d %s", a.Name, l.Type(), a.MTU, a.OperState))
		addrs, err := h.ns.handle.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, addr := range addrs {
			lines = append(lines, fmt.Sprintf("addr %s %s", a.Name, addr.IPNet))
		}
	}
	return lines, nil
}

func (h *Host) routes() ([]string, error) {
	all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	routes, err := h.ns.handle.RouteListFiltered(netlink.FAMILY_ALL, all, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, r := range routes {
		lines = append(lines, "route "+r.String())
	}
	rules, err := h.ns.handle.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		lines = append(lines, "rule "+r.String())
	}
	return lines, nil
}

func (h *Host) tables() (lines []string, err error) {
	err = h.ns.do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		tables, err := conn.ListTables()
		for _, t := range tables {
			lines = append(lines, fmt.Sprintf("table %d %s", t.Family, t.Name))
		}
		return err
	})
	return lines, err
}

// Processes lists the command lines of the programs that run on the host, sorted.
func (h *Host) Processes() []string {
	var lines []string
	for _, pid := range inside(map[uint64]bool{h.ns.inode: true}) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && len(line) > 0 { // what has ended has none
			lines = append(lines, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	slices.Sort(lines)
	return lines
}

// sockets lists the local ends of the host's sockets, without those that TCP is closing: no process holds them.
func (h *Host) sockets() (lines []string, err error) {
	err = h.ns.do(func() error {
		for _, kind := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
			f, err := os.Open("/proc/thread-self/net/" + kind)
			if err != nil {
				return err
			}
			lines = append(lines, socketLines(kind, f)...)
			f.Close()
		}
		return nil
	})
	return lines, err
}

func socketLines(kind string, f *os.File) []string {
	// FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, LAST_ACK, CLOSING (include/net/tcp_states.h).
	closing := []string{"04", "05", "06", "07", "09", "0B"}
	var lines []string
	sc := bufio.NewScanner(f)
	sc.Scan() // the heading
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) > 3 && !(strings.HasPrefix(kind, "tcp") && slices.Contains(closing, fields[3])) {
			lines = append(lines, "socket "+kind+" "+fields[1]+" state "+fields[3])
		}
	}
	return lines
}
