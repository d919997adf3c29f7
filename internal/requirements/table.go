package requirements

// releaseHosts are where the action gets the client from: GitHub's release page sends on to one of the others.
var releaseHosts = []string{"github.com", "release-assets.githubusercontent.com", "objects.githubusercontent.com"}

// Always is the When of a row that is needed whatever is configured.
const Always = "always"

// What several rows say alike.
const (
	whereRelays = "where the coordinator lists relays elsewhere (`relays`)"
	forDirect   = "for direct paths; without it packets go through a relay"
	stunPort    = "3478 (`udp`)"
	probePort   = "3479 (`probe`; the one after `udp`'s)"
	ownDNS      = "its own resolver"
)

// All lists every row, party by party.
func All() []Row {
	var all []Row
	for _, part := range [][]Row{runner(), gateway(), coordinator(), relay()} {
		all = append(all, part...)
	}
	return all
}

func runner() []Row {
	return []Row{
		{
			ID: "runner/coordinator", Party: Runner, Direction: Out, Peer: "the coordinator (`url`)", Protocol: "TCP", Port: "443",
			Carries: "HTTPS, WebSocket", Purpose: "joining and leaving; its relay over WebSocket, where UDP does not get out",
			When: Always, Required: true, targets: coordinatorAPI,
		},
		{
			ID: "runner/token", Party: Runner, Direction: Out, Peer: "`*.actions.githubusercontent.com`, or the GitHub Enterprise server", Protocol: "TCP", Port: "443",
			Carries: "HTTPS", Purpose: "the job's identity token",
			When: Always, Required: true, targets: tokenEndpoint,
		},
		{
			ID: "runner/dns", Party: Runner, Direction: Out, Peer: ownDNS, Protocol: "UDP, TCP", Port: "53",
			Carries: "DNS", Purpose: "the addresses of all names in this table",
			When: "unless a proxy looks them up (HTTPS_PROXY)", targets: names,
		},
		{
			ID: "runner/release", Party: Runner, Direction: Out, Peer: "`github.com`, `release-assets.githubusercontent.com`, `objects.githubusercontent.com`", Protocol: "TCP", Port: "443",
			Carries: "HTTPS", Purpose: "the action gets the client of its version",
			When: "unless the tool cache has it, the coordinator serves it under `/dl/`, or `binary` names one", targets: releases,
		},
		{
			ID: "runner/stun", Party: Runner, Direction: Out, Peer: "the coordinator", Protocol: "UDP", Port: stunPort,
			Carries: "STUN, relay", Purpose: "the runner's public address; its relay over UDP, which is faster than WebSocket",
			When: "for direct paths and the faster relay; without it everything goes over HTTPS", targets: firstSTUN,
		},
		{
			ID: "runner/probe", Party: Runner, Direction: Out, Peer: "the coordinator", Protocol: "UDP", Port: probePort,
			Carries: "STUN", Purpose: "telling easy NATs from hard ones",
			When: "for direct paths through hard NATs", targets: secondSTUN,
		},
		{
			ID: "runner/relay-https", Party: Runner, Direction: Out, Peer: "each relay (`relays`)", Protocol: "TCP", Port: "443",
			Carries: "WebSocket", Purpose: "relayed packets, where UDP does not get out",
			When: whereRelays, targets: relaysHTTPS,
		},
		{
			ID: "runner/relay-udp", Party: Runner, Direction: Out, Peer: "each relay (`relays`)", Protocol: "UDP", Port: "3478",
			Carries: "STUN, relay", Purpose: "relayed packets",
			When: whereRelays, targets: relaysUDP,
		},
		{
			ID: "runner/direct", Party: Runner, Direction: Out, Peer: "gateways' public addresses", Protocol: "UDP", Port: "any (51820 with `--public-address`)",
			Carries: "STUN, WireGuard", Purpose: "the tunnel itself, on a direct path",
			When: forDirect,
		},
	}
}

func gateway() []Row {
	return []Row{
		{
			ID: "gateway/coordinator", Party: Gateway, Direction: Out, Peer: "the coordinator (`--coordinator`)", Protocol: "TCP", Port: "443",
			Carries: "WebSocket", Purpose: "the control stream, over which jobs are offered; its relay, where UDP does not get out",
			When: Always, Required: true, targets: coordinatorAPI,
		},
		{
			ID: "gateway/issuer", Party: Gateway, Direction: Out, Peer: "`token.actions.githubusercontent.com`, or each `--issuer`", Protocol: "TCP", Port: "443",
			Carries: "HTTPS", Purpose: "the keys with which the gateway verifies jobs' tokens itself",
			When: "always, but for issuers with `--jwks-file`", Required: true, targets: issuers,
		},
		{
			ID: "gateway/dns", Party: Gateway, Direction: Out, Peer: ownDNS, Protocol: "UDP, TCP", Port: "53",
			Carries: "DNS", Purpose: "the addresses of the names in this table, and of targets that rules grant by name",
			When: "for targets that rules grant by name; for the others unless a proxy looks them up (HTTPS_PROXY)", targets: names,
		},
		{
			ID: "gateway/targets", Party: Gateway, Direction: Out, Peer: "what rules grant", Protocol: "TCP, UDP, ICMP", Port: "as granted",
			Carries: "the jobs' connections", Purpose: "what all this is for; nothing else in the private network needs to be reachable",
			When: Always,
		},
		{
			ID: "gateway/stun", Party: Gateway, Direction: Out, Peer: "the coordinator", Protocol: "UDP", Port: stunPort,
			Carries: "STUN, relay", Purpose: "the gateway's public address; its relay over UDP",
			When: "for direct paths and the faster relay; without it everything goes over HTTPS", targets: firstSTUN,
		},
		{
			ID: "gateway/probe", Party: Gateway, Direction: Out, Peer: "the coordinator", Protocol: "UDP", Port: probePort,
			Carries: "STUN", Purpose: "telling easy NATs from hard ones",
			When: "for direct paths through hard NATs", targets: secondSTUN,
		},
		{
			ID: "gateway/relay-https", Party: Gateway, Direction: Out, Peer: "each relay (`relays`)", Protocol: "TCP", Port: "443",
			Carries: "WebSocket", Purpose: "relayed packets, where UDP does not get out",
			When: whereRelays, targets: relaysHTTPS,
		},
		{
			ID: "gateway/relay-udp", Party: Gateway, Direction: Out, Peer: "each relay (`relays`)", Protocol: "UDP", Port: "3478",
			Carries: "STUN, relay", Purpose: "relayed packets",
			When: whereRelays, targets: relaysUDP,
		},
		{
			ID: "gateway/direct", Party: Gateway, Direction: Out, Peer: "runners' public addresses", Protocol: "UDP", Port: "1024–65535",
			Carries: "STUN, WireGuard", Purpose: "the tunnel itself, on a direct path; from the gateway's port 51820 (`--listen`)",
			When: forDirect,
		},
		{
			ID: "gateway/listen", Party: Gateway, Direction: In, Peer: "runners", Protocol: "UDP", Port: "51820 (`--listen`)",
			Carries: "STUN, WireGuard", Purpose: "the tunnel itself; to strangers the port is dead",
			When: "only with `--public-address`: a port that is forwarded to the gateway lets every runner in directly",
		},
		{
			ID: "gateway/router", Party: Gateway, Direction: Out, Peer: "the router on the default route", Protocol: "UDP, TCP", Port: "UDP 5351 and 1900, TCP as the router says",
			Carries: "PCP, NAT-PMP, UPnP", Purpose: "asking the router to forward the tunnel's port",
			When: "with `--port-mapping auto` and without a public address; nothing is lost where the router does not answer",
		},
		{
			ID: "gateway/metrics", Party: Gateway, Direction: In, Peer: "monitoring", Protocol: "TCP", Port: "as `--metrics` says, usually 9091 on loopback",
			Carries: "HTTP", Purpose: "health and metrics",
			When: "with `--metrics`",
		},
	}
}

func coordinator() []Row {
	return []Row{
		{
			ID: "coordinator/https", Party: Coordinator, Direction: In, Peer: "runners and gateways, or the proxy in front", Protocol: "TCP", Port: "443 (`listen`)",
			Carries: "HTTPS, WebSocket", Purpose: "joins, the gateways' control streams, its relay over WebSocket",
			When: Always, Required: true, targets: coordinatorAPI,
		},
		{
			ID: "coordinator/stun", Party: Coordinator, Direction: In, Peer: "runners and gateways", Protocol: "UDP", Port: stunPort,
			Carries: "STUN, relay", Purpose: "their public addresses; its relay over UDP",
			When: "unless `udp: off`, for platforms without UDP", targets: firstSTUN,
		},
		{
			ID: "coordinator/probe", Party: Coordinator, Direction: In, Peer: "runners and gateways", Protocol: "UDP", Port: probePort,
			Carries: "STUN", Purpose: "telling easy NATs from hard ones",
			When: "unless `probe: off`", targets: secondSTUN,
		},
		{
			ID: "coordinator/filter", Party: Coordinator, Direction: Out, Peer: "runners", Protocol: "UDP", Port: "any, from a port of the system's choice",
			Carries: "STUN", Purpose: "answers from another port, by which `culvert netcheck` learns how a NAT filters",
			When: "for `culvert netcheck` alone",
		},
		{
			ID: "coordinator/issuer", Party: Coordinator, Direction: Out, Peer: "`token.actions.githubusercontent.com`, or each of `issuers`; issuers of gateways' identities", Protocol: "TCP", Port: "443",
			Carries: "HTTPS", Purpose: "the keys with which tokens are verified",
			When: "always, but for issuers with `jwks_file`", Required: true, targets: issuers,
		},
		{
			ID: "coordinator/dns", Party: Coordinator, Direction: Out, Peer: ownDNS, Protocol: "UDP, TCP", Port: "53",
			Carries: "DNS", Purpose: "the addresses of issuers and of NATS servers",
			When: "unless a proxy looks them up (HTTPS_PROXY)", targets: names,
		},
		{
			ID: "coordinator/nats", Party: Coordinator, Direction: Out, Peer: "NATS servers (`state.nats`)", Protocol: "TCP", Port: "4222",
			Carries: "NATS over TLS", Purpose: "leases and the audit log, shared by several coordinators",
			When: "with `state: {nats: …}`", Required: true, targets: natsServers,
		},
		{
			ID: "coordinator/acme", Party: Coordinator, Direction: Out, Peer: "the CA's directory (`acme.directory`), Let's Encrypt's unless another is named", Protocol: "TCP", Port: "443",
			Carries: "HTTPS", Purpose: "getting and renewing its certificate",
			When: "with `acme`", Required: true, targets: acmeDirectory,
		},
		{
			ID: "coordinator/challenge", Party: Coordinator, Direction: In, Peer: "the CA, from anywhere", Protocol: "TCP", Port: "80 (`acme.http`)",
			Carries: "HTTP", Purpose: "showing the CA that the name is its own; without it that happens on port 443",
			When: "with `acme: {http: …}`",
		},
		{
			ID: "coordinator/private", Party: Coordinator, Direction: In, Peer: "monitoring and operators", Protocol: "TCP", Port: "as `private.listen` says, usually 9090 on loopback",
			Carries: "HTTP", Purpose: "metrics, health and the audit log",
			When: "with `private: {listen: …}`",
		},
	}
}

func relay() []Row {
	return []Row{
		{
			ID: "relay/udp", Party: Relay, Direction: In, Peer: "runners and gateways", Protocol: "UDP", Port: stunPort,
			Carries: "STUN, relay", Purpose: "relayed packets",
			When: "unless `udp: off`",
		},
		{
			ID: "relay/probe", Party: Relay, Direction: In, Peer: "runners and gateways", Protocol: "UDP", Port: probePort,
			Carries: "STUN", Purpose: "telling easy NATs from hard ones",
			When: "unless `probe: off`",
		},
		{
			ID: "relay/https", Party: Relay, Direction: In, Peer: "runners and gateways", Protocol: "TCP", Port: "443 (`listen`)",
			Carries: "WebSocket", Purpose: "relayed packets of networks that let no UDP out",
			When: Always,
		},
		{
			ID: "relay/metrics", Party: Relay, Direction: In, Peer: "monitoring", Protocol: "TCP", Port: "as `metrics` says, usually 9092 on loopback",
			Carries: "HTTP", Purpose: "metrics",
			When: "with `metrics`",
		},
	}
}
