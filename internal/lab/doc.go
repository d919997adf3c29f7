// Package lab builds small internets out of network namespaces, for tests and the demo: hosts, NATs, links with delay and
// loss. Real programs run in them over real kernel networking.
//
// It needs no tool of the distribution (netlink and nftables are spoken directly) and leaves nothing behind: a
// namespace is held by a file descriptor alone and has no name, so it is gone when this process is. It works as root, and
// without root inside a user namespace, which [Enter] provides where the kernel allows it.
//
//	runner ── nat-a ── (internet) ── nat-b ── gateway
//	                       │           └───── service
//	                  coordinator
//
// A test says what it wants in a few lines:
//
//	n, _ := lab.New(ctx)
//	home, _ := n.NAT("home", lab.NATOptions{Kind: lab.Hard, Link: lab.Link{Delay: 20 * time.Millisecond, MTU: 1400}})
//	runner, _ := n.Host("runner", lab.HostOptions{Behind: home})
//	server, _ := n.Host("server", lab.HostOptions{})
//	code, _ := runner.Run(ctx, lab.Program{Path: "/usr/bin/curl", Args: []string{server.Addr().String()}})
//	n.Block(runner.Public(), server.Addr())
//
// The internet is one router with a /30 out of 203.0.113.0/24 and 198.51.100.0/24 (RFC 5737) for each attachment and no route
// to anything private. Behind a NAT every host has a /24 of its own, routed by the NAT, so no bridge is needed.
package lab
