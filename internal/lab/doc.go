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
// The internet is one router with a /30 out of 203.0.113.0/24 and 198.51.100.0/24 (RFC 5737) for each attachment and no route
// to anything private. Behind a NAT every host has a /24 of its own, routed by the NAT, so no bridge is needed.
package lab
