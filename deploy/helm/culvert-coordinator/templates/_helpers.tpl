{{- define "coordinator.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}
{{- define "coordinator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "coordinator.labels" -}}
{{ include "coordinator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
{{- define "coordinator.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ end }}
{{- end }}
{{- define "coordinator.port" -}}
{{- if .Values.tls.secret }}8443{{ else }}8080{{ end }}
{{- end }}
{{- define "coordinator.config" -}}
{{- $c := deepCopy .Values.config }}
{{- $_ := set $c "listen" (printf ":%s" (include "coordinator.port" .)) }}
{{- $_ := set $c "udp" (ternary (printf ":%v" .Values.udp.port) "off" .Values.udp.enabled) }}
{{- $_ := set $c "private" (dict "listen" (printf "0.0.0.0:%v" .Values.metrics.port)) }}
{{- if .Values.tls.secret }}{{ $_ := set $c "tls" (dict "cert" "/etc/culvert/tls/tls.crt" "key" "/etc/culvert/tls/tls.key") }}
{{- else if not .Values.trustedProxies }}{{ fail "trustedProxies is needed where an ingress terminates TLS: the range of its pods" }}
{{- else }}{{ $_ := set $c "trusted_proxies" .Values.trustedProxies }}{{ end }}
{{- if .Values.state.nats }}
{{- $s := dict "nats" .Values.state.nats }}
{{- if .Values.state.natsCredentialsSecret }}{{ $_ := set $s "credentials" "/etc/culvert/nats/creds" }}{{ end }}
{{- $_ := set $c "state" $s }}
{{- else }}{{ $_ := set $c "state" (dict "dir" "/var/lib/culvert") }}{{ end }}
{{- if gt (int .Values.replicas) 1 }}
{{- if not $c.relays }}{{ fail "several replicas need config.relays: both sides of a session have to meet at one relay, and a Service leads them to any replica" }}{{ end }}
{{- if not (hasKey $c "relay") }}{{ $_ := set $c "relay" "off" }}{{ end }}
{{- end }}
{{- if .Values.udp.enabled }}
{{- $host := required "udp.host is needed: the name that leads to the UDP Service's address" .Values.udp.host }}
{{- if not (hasKey $c "stun") }}{{ $_ := set $c "stun" (list (printf "%s:%v" $host .Values.udp.port) (printf "%s:%d" $host (add1 .Values.udp.port))) }}{{ end }}
{{- if ne (toString $c.relay) "off" }}
{{- $own := dict "name" (dig "relay" "name" "coordinator" $c) "udp" (printf "%s:%v" $host .Values.udp.port) "url" $c.url }}
{{- $_ := set $c "relays" (prepend (default list $c.relays) $own) }}
{{- end }}
{{- end }}
{{- toYaml $c }}
{{- end }}
