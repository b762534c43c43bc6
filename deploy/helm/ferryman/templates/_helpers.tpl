{{- define "ferryman.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough that the longest suffix, -serving-headless, leaves a DNS label. */}}
{{- define "ferryman.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "ferryman.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ferryman.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ferryman.selector" -}}
app.kubernetes.io/name: {{ include "ferryman.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ferryman.labels" -}}
{{ include "ferryman.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "ferryman.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ferryman.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "ferryman.claim" -}}
{{- default (printf "%s-data" (include "ferryman.fullname" .)) .Values.persistence.existingClaim -}}
{{- end -}}

{{/* What the roles of the control plane are: it translates too where nothing else does. */}}
{{- define "ferryman.controlPlaneRoles" -}}
{{- if .Values.serving.enabled -}}training{{- else -}}training,translation{{- end -}}
{{- end -}}

{{- define "ferryman.servingShares" -}}
{{- if and .Values.serving.enabled (eq .Values.serving.models.source "shared") -}}true{{- end -}}
{{- end -}}

{{/* The image of a component. Takes root, component (its values) and suffix (of the default tag). */}}
{{- define "ferryman.image" -}}
{{- $image := .component.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" .root.Values.image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" .root.Values.image.repository (default (printf "%s-%s" .root.Chart.AppVersion .suffix) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* A configuration file: what all pods share, and over it what a component has of its own. The scalars of JSON are
those of TOML, and unlike toToml this keeps whole numbers whole. */}}
{{- define "ferryman.config" -}}
{{- $config := mergeOverwrite (deepCopy .root.Values.config) .component.config -}}
{{- range $option, $value := $config }}
{{ $option }} = {{ $value | toJson }}
{{- end }}
{{- end -}}

{{- define "ferryman.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "ferryman.securityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What both components set for the process: the chart's own options, and secrets by file. */}}
{{- define "ferryman.env" -}}
- name: FERRYMAN_CONFIG
  value: /etc/ferryman/config/ferryman.toml
- name: FERRYMAN_HOST
  value: {{ .Values.bindAddress | quote }}
- name: FERRYMAN_PORT
  value: {{ .Values.ports.grpc | quote }}
- name: FERRYMAN_METRICS_HOST
  value: {{ .Values.bindAddress | quote }}
- name: FERRYMAN_METRICS_PORT
  value: {{ .Values.ports.metrics | quote }}
- name: FERRYMAN_PROBE_HOST
  value: {{ .Values.bindAddress | quote }}
- name: FERRYMAN_PROBE_PORT
  value: {{ .Values.ports.probe | quote }}
- name: FERRYMAN_DRAIN_S
  value: {{ .Values.shutdown.drainSeconds | quote }}
- name: FERRYMAN_GRACE_S
  value: {{ .Values.shutdown.graceSeconds | quote }}
{{- range $option, $_ := .Values.configFromSecrets }}
- name: FERRYMAN_{{ upper $option }}_FILE
  value: /etc/ferryman/secrets/{{ $option }}
{{- end }}
{{- end -}}

{{- define "ferryman.ports" -}}
- name: grpc
  containerPort: {{ .Values.ports.grpc }}
  protocol: TCP
- name: probe
  containerPort: {{ .Values.ports.probe }}
  protocol: TCP
- name: metrics
  containerPort: {{ .Values.ports.metrics }}
  protocol: TCP
{{- end -}}

{{/* Probes of the probe port. Takes root and ready, the health name that readiness asks for. */}}
{{- define "ferryman.probes" -}}
{{- $port := .root.Values.ports.probe -}}
startupProbe:
  grpc:
    port: {{ $port }}
    service: liveness
  {{- toYaml .root.Values.probes.startup | nindent 2 }}
readinessProbe:
  grpc:
    port: {{ $port }}
    service: {{ .ready | quote }}
  {{- toYaml .root.Values.probes.readiness | nindent 2 }}
livenessProbe:
  grpc:
    port: {{ $port }}
    service: liveness
  {{- toYaml .root.Values.probes.liveness | nindent 2 }}
{{- end -}}

{{- define "ferryman.lifecycle" -}}
{{- if .Values.shutdown.preStopSeconds -}}
lifecycle:
  preStop:
    sleep:
      seconds: {{ .Values.shutdown.preStopSeconds }}
{{- end -}}
{{- end -}}

{{- define "ferryman.terminationSeconds" -}}
{{- $shutdown := .Values.shutdown -}}
{{- add $shutdown.preStopSeconds $shutdown.drainSeconds $shutdown.graceSeconds $shutdown.marginSeconds -}}
{{- end -}}

{{/* Many volumes, an emptyDir among them, can be written by every user: the service makes a folder in them that only it
can use. */}}
{{- define "ferryman.dataFolder" -}}
/data/own
{{- end -}}

{{- define "ferryman.mounts" -}}
- name: data
  mountPath: /data
- name: tmp
  mountPath: /tmp
- name: config
  mountPath: /etc/ferryman/config
  readOnly: true
{{- if .Values.configFromSecrets }}
- name: secrets
  mountPath: /etc/ferryman/secrets
  readOnly: true
{{- end }}
{{- end -}}

{{/* Volumes but that of the data. Takes root and file, the key of the ConfigMap. */}}
{{- define "ferryman.volumes" -}}
- name: tmp
  emptyDir: {}
- name: config
  configMap:
    name: {{ include "ferryman.fullname" .root }}
    items:
      - key: {{ .file }}
        path: ferryman.toml
{{- with .root.Values.configFromSecrets }}
- name: secrets
  projected:
    sources:
    {{- range $option, $reference := . }}
      - secret:
          name: {{ $reference.name }}
          items:
            - key: {{ $reference.key }}
              path: {{ $option }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* What must hold of a node for a pod that requires the node affinities of several components: each alternative of one,
together with each of the next. Takes their affinities. */}}
{{- define "ferryman.nodeSelectorTerms" -}}
{{- $terms := list dict -}}
{{- range $affinity := . -}}
{{- $alternatives := list -}}
{{- range $next := dig "nodeAffinity" "requiredDuringSchedulingIgnoredDuringExecution" "nodeSelectorTerms" list $affinity -}}
{{- range $term := $terms -}}
{{- $both := dict -}}
{{- range $field := list "matchExpressions" "matchFields" -}}
{{- with concat (default list (get $term $field)) (default list (get $next $field)) | uniq -}}
{{- $_ := set $both $field . -}}
{{- end -}}
{{- end -}}
{{- $alternatives = append $alternatives $both -}}
{{- end -}}
{{- end -}}
{{- $terms = default $terms $alternatives -}}
{{- end -}}
{{- compact $terms | toJson -}}
{{- end -}}

{{/* Where a pod may run. Pods that share the data folder go to one node: SQLite in WAL mode serves the processes of one
machine. The first of them fits its own rule, so it goes anywhere that suits all of them: each has what any component asks
of nodes. Takes root, component and shares. */}}
{{- define "ferryman.affinity" -}}
{{- $affinity := deepCopy .component.affinity -}}
{{- if .shares -}}
{{- $values := .root.Values -}}
{{- with include "ferryman.nodeSelectorTerms" (list $values.controlPlane.affinity $values.serving.affinity) | fromJsonArray -}}
{{- $required := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" .) -}}
{{- $_ := set $affinity "nodeAffinity" (merge $required (default dict (get $affinity "nodeAffinity"))) -}}
{{- end -}}
{{- $labels := merge (dict "ferryman/data-folder" "shared") (include "ferryman.selector" .root | fromYaml) -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) -}}
{{- $pods := default dict (get $affinity "podAffinity") -}}
{{- $required := append (default list (get $pods "requiredDuringSchedulingIgnoredDuringExecution")) $term -}}
{{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" $required -}}
{{- $_ := set $affinity "podAffinity" $pods -}}
{{- end -}}
{{- with $affinity -}}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* The rest of a pod that both components may be given. Takes root, component and, for pods that share, shares. */}}
{{- define "ferryman.placement" -}}
{{- $selector := deepCopy .component.nodeSelector -}}
{{- $tolerations := .component.tolerations -}}
{{- if .shares -}}
{{- $values := .root.Values -}}
{{- $selector = merge $selector $values.controlPlane.nodeSelector $values.serving.nodeSelector -}}
{{- $tolerations = concat $values.controlPlane.tolerations $values.serving.tolerations | uniq -}}
{{- end -}}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .component.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .component.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* What the containers of `helm test` have in common. Takes what ferryman.image does. */}}
{{- define "ferryman.testContainer" -}}
image: {{ include "ferryman.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
resources:
  requests: {cpu: 100m, memory: 128Mi}
  limits: {memory: 256Mi}
securityContext:
  {{- include "ferryman.securityContext" . | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end -}}

{{/* What no schema can say. */}}
{{- define "ferryman.check" -}}
{{- if not (or .Values.controlPlane.enabled .Values.serving.enabled) -}}
{{- fail "nothing to install: enable controlPlane, serving or both" -}}
{{- end -}}
{{- if include "ferryman.servingShares" . -}}
{{- if not .Values.controlPlane.enabled -}}
{{- fail "serving.models.source is shared, but there is no controlPlane to share with: enable it, or choose import" -}}
{{- end -}}
{{- if not .Values.persistence.enabled -}}
{{- fail "serving.models.source is shared, which needs persistence.enabled" -}}
{{- end -}}
{{- range $label, $value := .Values.controlPlane.nodeSelector -}}
{{- if ne $value (get $.Values.serving.nodeSelector $label | default $value) -}}
{{- fail (printf "serving.models.source is shared, so all pods run on one node, but the two nodeSelectors differ in %s" $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.serving.enabled (eq .Values.serving.models.source "import") -}}
{{- if not (and .Values.serving.models.volume .Values.serving.models.import) -}}
{{- fail "serving.models.source is import, which needs serving.models.volume and serving.models.import" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.serving.autoscaling.kind "keda") (not .Values.serving.autoscaling.prometheusAddress) -}}
{{- fail "serving.autoscaling.kind is keda, which needs serving.autoscaling.prometheusAddress" -}}
{{- end -}}
{{- if gt (int .Values.serving.autoscaling.minReplicas) (int .Values.serving.autoscaling.maxReplicas) -}}
{{- fail "serving.autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor.enabled .Values.monitoring.podMonitor.enabled -}}
{{- fail "monitoring: enable serviceMonitor or podMonitor; with both everything would be counted twice" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.enabled needs grpcRoute.parentRefs" -}}
{{- end -}}
{{- end -}}
