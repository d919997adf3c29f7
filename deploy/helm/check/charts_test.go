// Package check renders the charts with Helm's own engine and holds what comes out against the API's types, the restricted Pod
// Security Standard, the coordinator's own checks and the table of what Culvert needs from a network. It is a module of its own,
// so that nothing of Kubernetes gets into the programs' dependencies: make charts.
package check

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvertnet/culvert/internal/requirements"
)

const gatewayValues = `
coordinator: https://culvert.example.com
network: corp
owners: [9919, 123456789]
networkPolicy:
  targets: [{to: [{ipBlock: {cidr: 10.20.0.5/32}}], ports: [{port: 5432}]}]
`

const coordinatorValues = `
config:
  url: https://culvert.example.com
  networks: {corp: {gateways: [{issuer: "https://oidc.example.com/cluster", subject: "system:serviceaccount:culvert:gateway"}]}}
  rules:
    - name: deploy
      network: corp
      match: {repository_owner_id: 123456789, repository: acme/shop, ref: refs/heads/main, runner_environment: github-hosted}
      allow: ["tcp 10.20.0.5:5432"]
trustedProxies: [10.0.0.0/8]
`

const udpValues = "udp: {enabled: true, host: udp.example.com}\ntls: {secret: tls}\nservice: {type: LoadBalancer}\n"

const natsValues = `
state: {nats: ["tls://n1:4222"], natsCredentialsSecret: nats}
replicas: 3
config: {relays: [{name: eu, udp: "relay-eu.example.com:3478"}]}
udp: {enabled: true, host: udp.example.com}
`

// scenarios are values that users may have, over the two above.
var scenarios = []struct{ name, chart, more string }{
	{"gateway", "culvert-gateway", ""},
	{"gateway with all", "culvert-gateway", `
policy: "rules:\n  - {name: own, network: corp, match: {repository_owner_id: 9919}, allow: [\"tcp 10.20.0.5:5432\"]}\n"
state: {persist: true, storageClassName: fast}
identity: {enrolSecret: enrol}
publicAddress: 203.0.113.5:51820
resolvers: ["10.20.0.2:53"]
issuers: [https://token.actions.githubusercontent.com]
priorityClassName: high
nodeSelector: {disk: ssd}
podLabels: {team: platform}
networkPolicy: {direct: false, metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]}
`},
	{"coordinator", "culvert-coordinator", "ingress: {enabled: true, host: culvert.example.com, className: nginx, tlsSecret: tls}\n"},
	{"coordinator with UDP", "culvert-coordinator", udpValues},
	{"coordinators on NATS", "culvert-coordinator", natsValues},
}

func base(chart string) string {
	if chart == "culvert-gateway" {
		return gatewayValues
	}
	return coordinatorValues
}

// render gives the chart's documents for values, and the error of the rendering.
func render(t *testing.T, chart string, values ...string) ([]string, error) {
	t.Helper()
	c, err := loader.Load(filepath.Join("..", chart))
	if err != nil {
		t.Fatal(err)
	}
	all := chartutil.Values{}
	for _, text := range values {
		v, err := chartutil.ReadValues([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		all = chartutil.MergeTables(v, all)
	}
	caps := chartutil.DefaultCapabilities.Copy()
	caps.KubeVersion = chartutil.KubeVersion{Version: "v1.30.0", Major: "1", Minor: "30"}
	vals, err := chartutil.ToRenderValues(c, all, chartutil.ReleaseOptions{Name: "ci", Namespace: "culvert", IsInstall: true}, caps)
	if err != nil {
		t.Fatal(err)
	}
	files, err := engine.Render(c, vals)
	var docs []string
	for name, text := range files {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		for _, d := range strings.Split("\n"+text, "\n---\n") {
			if strings.TrimSpace(d) != "" {
				docs = append(docs, d)
			}
		}
	}
	return docs, err
}

// typed decodes a document strictly: a field that the API does not have is an error.
func typed(doc string) (any, error) {
	var kind struct{ Kind string }
	if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
		return nil, err
	}
	into := map[string]any{
		"Deployment": &appsv1.Deployment{}, "StatefulSet": &appsv1.StatefulSet{}, "Service": &corev1.Service{}, "ConfigMap": &corev1.ConfigMap{},
		"ServiceAccount": &corev1.ServiceAccount{}, "PodDisruptionBudget": &policyv1.PodDisruptionBudget{}, "NetworkPolicy": &networkingv1.NetworkPolicy{},
		"Ingress": &networkingv1.Ingress{},
	}[kind.Kind]
	if into == nil {
		return nil, fmt.Errorf("unexpected kind %q", kind.Kind)
	}
	return into, yaml.UnmarshalStrict([]byte(doc), into)
}

func TestCharts(t *testing.T) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			docs, err := render(t, s.chart, base(s.chart), s.more)
			if err != nil {
				t.Fatal(err)
			}
			hold(t, docs)
		})
	}
}

// hold holds a chart's documents against the API's types, and what is in them against what is promised of it.
func hold(t *testing.T, docs []string) {
	t.Helper()
	workloads := 0
	var services []*corev1.Service
	var pod corev1.PodTemplateSpec
	for _, d := range docs {
		object, err := typed(d)
		if err != nil {
			t.Fatalf("%v\n%s", err, d)
		}
		switch o := object.(type) {
		case *appsv1.Deployment:
			workloads, pod = workloads+1, o.Spec.Template
		case *appsv1.StatefulSet:
			workloads, pod = workloads+1, o.Spec.Template
		case *corev1.Service:
			services = append(services, o)
		case *corev1.ConfigMap:
			checked(t, o.Data)
		}
	}
	if workloads != 1 {
		t.Fatalf("%d workloads", workloads)
	}
	restricted(t, pod)
	for _, s := range services {
		led(t, s, pod)
	}
	for _, v := range pod.Spec.Volumes {
		if v.Projected != nil {
			if token := v.Projected.Sources[0].ServiceAccountToken; token == nil || token.Audience != "https://culvert.example.com" || *token.ExpirationSeconds > 3600 {
				t.Errorf("the projected token is %+v", token)
			}
		}
	}
}

// led: each port of a Service leads to one that the pod has, of the same protocol, and a number that clients are told stays what it is.
func led(t *testing.T, s *corev1.Service, pod corev1.PodTemplateSpec) {
	t.Helper()
	for name, value := range s.Spec.Selector {
		if pod.Labels[name] != value {
			t.Errorf("service %s selects %s=%s, and the pod has %q", s.Name, name, value, pod.Labels[name])
		}
	}
	for _, p := range s.Spec.Ports {
		if p.Protocol == "" {
			p.Protocol = corev1.ProtocolTCP
		}
		if !slices.ContainsFunc(pod.Spec.Containers[0].Ports, func(c corev1.ContainerPort) bool {
			return c.Name == p.Name && c.Name == p.TargetPort.String() && c.Protocol == p.Protocol && (c.Protocol == corev1.ProtocolTCP || c.ContainerPort == p.Port)
		}) {
			t.Errorf("service %s: port %s %s %d leads to %s, which the pod does not have so", s.Name, p.Name, p.Protocol, p.Port, p.TargetPort.String())
		}
	}
}

// restricted holds a pod against the restricted Pod Security Standard, and against what Culvert promises beyond it.
func restricted(t *testing.T, pod corev1.PodTemplateSpec) {
	t.Helper()
	s := pod.Spec
	if s.HostNetwork || s.HostPID || s.HostIPC || s.AutomountServiceAccountToken == nil || *s.AutomountServiceAccountToken {
		t.Error("the pod shares something with its host, or is given a token that it does not need")
	}
	if sc := s.SecurityContext; sc == nil || !*sc.RunAsNonRoot || *sc.RunAsUser != 65532 || sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the pod's security context is %+v", sc)
	}
	for _, c := range s.Containers {
		sc := c.SecurityContext
		if *sc.AllowPrivilegeEscalation || !*sc.ReadOnlyRootFilesystem || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(sc.Capabilities.Add) > 0 {
			t.Errorf("%s: %+v", c.Name, sc)
		}
		if c.LivenessProbe == nil || c.ReadinessProbe == nil || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s lacks probes or a memory limit", c.Name)
		}
	}
	for _, v := range s.Volumes {
		if v.HostPath != nil {
			t.Errorf("volume %s is the host's", v.Name)
		}
	}
}

// checked has the coordinator check the files of a ConfigMap.
func checked(t *testing.T, data map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range data {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range data {
		args := []string{"run", "./coordinator", "check", filepath.Join(dir, name)}
		switch name {
		case "culvert.yaml":
		case "policy.yaml":
			args = append(args, "--gateway-policy")
		default: // a file that culvert.yaml speaks of
			continue
		}
		cmd := exec.Command("go", args...)
		cmd.Dir = "../../.."
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s\n%s", name, err, out, text)
		}
	}
}

func TestLint(t *testing.T) {
	for _, chart := range []string{"culvert-gateway", "culvert-coordinator"} {
		values, err := chartutil.ReadValues([]byte(base(chart)))
		if err != nil {
			t.Fatal(err)
		}
		version := chartutil.KubeVersion{Version: "v1.30.0", Major: "1", Minor: "30"}
		for _, m := range lint.AllWithKubeVersion(filepath.Join("..", chart), values, "culvert", &version).Messages {
			if m.Severity >= support.WarningSev {
				t.Errorf("%s: %s", chart, m)
			}
		}
	}
}

// written is the culvert.yaml that a chart's ConfigMap holds.
func written(t *testing.T, values ...string) (config map[string]any) {
	t.Helper()
	docs, err := render(t, "culvert-coordinator", append([]string{coordinatorValues}, values...)...)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range docs {
		if o, err := typed(d); err == nil {
			if m, ok := o.(*corev1.ConfigMap); ok {
				if err := yaml.Unmarshal([]byte(m.Data["culvert.yaml"]), &config); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return config
}

// TestUDPIsFoundWhereItIs: the UDP Service has an address of its own, so clients are told its name; of several coordinators none relays, because
// both sides of a session would have to reach the same one.
func TestUDPIsFoundWhereItIs(t *testing.T) {
	stun := []any{"udp.example.com:3478", "udp.example.com:3479"}
	one := written(t, udpValues)
	own := []any{map[string]any{"name": "coordinator", "udp": "udp.example.com:3478", "url": "https://culvert.example.com"}}
	if !reflect.DeepEqual(one["stun"], any(stun)) || !reflect.DeepEqual(one["relays"], any(own)) {
		t.Errorf("one coordinator: stun %v, relays %v", one["stun"], one["relays"])
	}
	several := written(t, natsValues)
	eu := []any{map[string]any{"name": "eu", "udp": "relay-eu.example.com:3478"}}
	if !reflect.DeepEqual(several["stun"], any(stun)) || !reflect.DeepEqual(several["relays"], any(eu)) || several["relay"] != "off" {
		t.Errorf("several: stun %v, relays %v, relay %v", several["stun"], several["relays"], several["relay"])
	}
}

// TestGuide: the values that docs/kubernetes.md shows are taken, and give what the charts promise.
func TestGuide(t *testing.T) {
	page, err := os.ReadFile("../../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := regexp.MustCompile("(?ms)^```yaml values (culvert-[a-z]+)\n(.*?)^```$").FindAllStringSubmatch(string(page), -1)
	if len(shown) < 3 {
		t.Fatalf("the guide shows %d files of values", len(shown))
	}
	for _, m := range shown {
		docs, err := render(t, m[1], m[2])
		if err != nil {
			t.Errorf("%v\n%s", err, m[2])
			continue
		}
		hold(t, docs)
	}
}

// TestRefusals: values with which nothing could work are refused when they are given, not by a pod that does not start.
func TestRefusals(t *testing.T) {
	for _, c := range []struct{ chart, more, says string }{
		{"culvert-gateway", "coordinator: ''", "coordinator is needed"},
		{"culvert-gateway", "network: ''", "network is needed"},
		{"culvert-gateway", "owners: []", "owners or policy is needed"},
		{"culvert-gateway", "identity: {projected: false}", "identity.projected or identity.enrolSecret"},
		{"culvert-coordinator", "replicas: 2", "several replicas need state.nats"},
		{"culvert-coordinator", "trustedProxies: []", "trustedProxies is needed"},
		{"culvert-coordinator", "ingress: {enabled: true}", "ingress.host is needed"},
		{"culvert-coordinator", "udp: {enabled: true}", "udp.host is needed"},
		{"culvert-coordinator", "{state: {nats: [\"tls://n1:4222\"]}, replicas: 2}", "several replicas need config.relays"},
	} {
		if _, err := render(t, c.chart, base(c.chart), c.more); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s with %q: %v, want %q", c.chart, c.more, err, c.says)
		}
	}
}

// TestNetworkPolicyIsTheTable: what the gateway's NetworkPolicy lets out is what the table of requirements says, and no more.
func TestNetworkPolicyIsTheTable(t *testing.T) {
	docs, err := render(t, "culvert-gateway", gatewayValues)
	if err != nil {
		t.Fatal(err)
	}
	var policy *networkingv1.NetworkPolicy
	for _, d := range docs {
		if o, err := typed(d); err == nil {
			if p, ok := o.(*networkingv1.NetworkPolicy); ok {
				policy = p
			}
		}
	}
	if policy == nil {
		t.Fatal("no NetworkPolicy")
	}
	if len(policy.Spec.Ingress) != 0 {
		t.Error("something is let in")
	}
	used := map[string]bool{}
	for _, r := range requirements.All() {
		switch {
		case r.Party != requirements.Gateway || r.Direction != requirements.Out:
		case r.ID == "gateway/targets": // networkPolicy.targets, which only the user knows
		case strings.Contains(r.Carries, "NAT-PMP"): // the chart turns port mapping off
		default:
			for _, protocol := range strings.Split(r.Protocol, ", ") {
				from, to := ports(t, r.Port)
				if rule := allowed(policy, protocol, from, to); rule == "" {
					t.Errorf("%s: %s %d to %d is needed and not let out", r.ID, protocol, from, to)
				} else {
					used[rule] = true
				}
			}
		}
	}
	for i, e := range policy.Spec.Egress[:2] { // the third is networkPolicy.targets
		for j, p := range e.Ports {
			if !used[key(i, j)] {
				t.Errorf("%s %s is let out, and nothing needs it", *p.Protocol, p.Port)
			}
		}
	}
	if dns := policy.Spec.Egress[0].To; len(dns) != 1 || dns[0].PodSelector == nil || dns[0].NamespaceSelector == nil || dns[0].IPBlock != nil {
		t.Errorf("port 53 is open to %v, which is not the cluster's resolver alone", dns)
	}
	for _, c := range reached {
		if got := permits(t, policy, c.addr, c.protocol, c.port); got != c.want {
			t.Errorf("%s %s:%d is let out: %v, want %v", c.protocol, c.addr, c.port, got, c.want)
		}
	}
}

// reached is what a gateway with the policy of gatewayValues gets to, and what it does not.
var reached = []struct {
	addr     string
	protocol corev1.Protocol
	port     int
	want     bool
}{
	{"203.0.114.7", "TCP", 443, true}, // coordinator, relay, issuer
	{"203.0.114.7", "UDP", 3478, true},
	{"198.51.101.9", "UDP", 40000, true}, // a runner
	{"10.20.0.5", "TCP", 5432, true},     // what is granted
	{"10.20.0.5", "TCP", 22, false},
	{"10.20.0.5", "TCP", 443, false},
	{"10.20.0.6", "TCP", 5432, false},
	{"10.96.0.1", "TCP", 443, false}, // the API server
	{"203.0.114.7", "TCP", 80, false},
	{"203.0.114.7", "TCP", 22, false},
	{"203.0.114.7", "UDP", 53, false},
	{"169.254.169.254", "TCP", 443, false},
	{"169.254.169.254", "TCP", 80, false},
	{"168.63.129.16", "TCP", 443, false},
	{"100.100.100.200", "TCP", 443, false},
	{"192.168.1.1", "UDP", 40000, false},
	{"172.16.0.1", "TCP", 443, false},
	{"127.0.0.1", "TCP", 443, false},
	{"198.18.0.1", "TCP", 443, false},
	{"224.0.0.1", "UDP", 40000, false},
}

// permits evaluates a NetworkPolicy as the API documents it, for an address outside the cluster.
func permits(t *testing.T, p *networkingv1.NetworkPolicy, addr string, protocol corev1.Protocol, port int) bool {
	t.Helper()
	inside := func(cidr string) bool { return netip.MustParsePrefix(cidr).Contains(netip.MustParseAddr(addr)) }
	for _, e := range p.Spec.Egress {
		to := len(e.To) == 0 // none is everybody
		for _, peer := range e.To {
			to = to || peer.IPBlock != nil && inside(peer.IPBlock.CIDR) && !slices.ContainsFunc(peer.IPBlock.Except, inside)
		}
		through := len(e.Ports) == 0
		for _, open := range e.Ports {
			first, last, by := open.Port.IntValue(), open.Port.IntValue(), corev1.ProtocolTCP
			if open.EndPort != nil {
				last = int(*open.EndPort)
			}
			if open.Protocol != nil {
				by = *open.Protocol
			}
			through = through || by == protocol && first <= port && port <= last
		}
		if to && through {
			return true
		}
	}
	return false
}

func key(i, j int) string { return fmt.Sprintf("%d.%d", i, j) }

// ports reads the first port or range of a row.
func ports(t *testing.T, text string) (from, to int) {
	t.Helper()
	text, _, _ = strings.Cut(text, " ")
	a, b, ranged := strings.Cut(text, "–")
	from, err := strconv.Atoi(a)
	if err != nil {
		t.Fatalf("a row's port is %q", text)
	}
	if !ranged {
		return from, from
	}
	if to, err = strconv.Atoi(b); err != nil {
		t.Fatalf("a row's port is %q", text)
	}
	return from, to
}

// allowed names the port of the policy that lets a range out; "" where none does.
func allowed(p *networkingv1.NetworkPolicy, protocol string, from, to int) string {
	for i, e := range p.Spec.Egress[:2] {
		for j, port := range e.Ports {
			last := port.Port.IntValue()
			if port.EndPort != nil {
				last = int(*port.EndPort)
			}
			if string(*port.Protocol) == protocol && port.Port.IntValue() <= from && to <= last {
				return key(i, j)
			}
		}
	}
	return ""
}
