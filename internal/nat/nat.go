// Package nat finds out where this host is reachable: STUN messages, server and probes, host candidates, what the NAT in
// front of it does, and when its network changes.
//
// Messages are read by hand over their bytes, because reading them stands in the receive path of the tunnel's socket:
// nothing that peeks or verifies allocates, keeps a reference to what it was given or writes to it.
package nat
