// Package tunnel is the WireGuard device and the Bind under it: one UDP socket for WireGuard, path checks and relay frames, one
// virtual endpoint for each peer, and the choice of the path behind it.
//
// # What a program does with it
//
// Both sides:
//
//	t, err := tunnel.New(tunnel.Options{…, Relays: tunnel.RelayOptions{Dial: tunnel.DialRelay(httpClient, header), Keep: gateway}})
//	t.SetRelays(list)                      // as soon as relays are known: each is asked over UDP at once; again whenever the list changes
//	p, err := t.AddPeer(tunnel.PeerOptions{…, Relays: grants, OnPath: …, OnMTU: …})
//	p.AddRelays(grants)                    // grants that come later; known relays are ignored
//	t.SetNAT(mapping, seen)                // whenever it is found out: a hard NAT's port is guessed from then on, where that is of use
//	t.Refresh()                            // the local network has changed: relays and paths are tried anew, sockets stay
//	p.Status()                             // path (kind, relay, transport), round-trip time, bytes, handshake, MTU, changes
//
// The client measures relays before it joins: [Tunnel.Relay] waits for one to answer and gives its round-trip time and the
// address at which it sees this socket, which is a reflexive candidate; [Tunnel.Relays] lists all, nearest first, without waiting. Without
// [RelayOptions.Keep] WebSockets are dialled at the same time, so that blocked UDP costs nothing, and closed when a path over UDP has
// carried the traffic for a while.
//
// The gateway sets Keep: every relay is asked again and again, which keeps the NAT's mapping open and notices a relay's restart, at
// one packet a relay and not a session; a WebSocket is open only while a relay does not answer over UDP.
//
// Grants name their relay in full, so that one which SetRelays has not named works as well. Tickets are bound at once, and again
// whenever the relay's key, our mapped address or the transport changes.
//
// With [Options.Device] WireGuard is spoken outside this process, by the kernel; everything else is the same.
//
// [PeerOptions.OnMTU] says when more fits than [StartMTU], or less than before, on every path: a client sets its TUN device's MTU, a
// gateway cuts what it sends to this peer to [Peer.MTU].
package tunnel
