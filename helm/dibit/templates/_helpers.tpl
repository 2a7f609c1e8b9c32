{{- define "dibit.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Short enough that KubeRay's suffixes fit a label. */}}
{{- define "dibit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "dibit.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dibit.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "dibit.selector" -}}
app.kubernetes.io/name: {{ include "dibit.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "dibit.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "dibit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "dibit.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "dibit.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "dibit.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "dibit.redisAddress" -}}
{{- .Values.ray.gcsFaultTolerance.redisAddress | default (printf "%s-redis:6379" (include "dibit.fullname" .)) }}
{{- end }}

{{- define "dibit.redisSecret" -}}
{{- .Values.ray.gcsFaultTolerance.passwordSecret | default (printf "%s-redis" (include "dibit.fullname" .)) }}
{{- end }}

{{- define "dibit.bundledRedis" -}}
{{- and .Values.ray.gcsFaultTolerance.enabled (not .Values.ray.gcsFaultTolerance.redisAddress) | ternary "true" "" }}
{{- end }}

{{/* {min, max} of a number or of bounds, as JSON. */}}
{{- define "dibit.bounds" -}}
{{- if kindIs "map" . -}}
{{- dict "min" (int (dig "min" 1 .)) "max" (int .max) | toJson }}
{{- else -}}
{{- dict "min" (int .) "max" (int .) | toJson }}
{{- end }}
{{- end }}

{{/* GPUs of a worker pod of a pool; 0 on the CPU. */}}
{{- define "dibit.gpus" -}}
{{- if .accelerator_type -}}
{{- dig "worker" "gpus" (dig "tensor_parallel_size" 1 .) . | int }}
{{- else -}}
0
{{- end }}
{{- end }}

{{/* Worker pods that so many engines of a pool need: list of the pool and the number. */}}
{{- define "dibit.workers" -}}
{{- $pool := index . 0 -}}
{{- $engines := int (index . 1) -}}
{{- $ranks := dig "tensor_parallel_size" 1 $pool | int -}}
{{- $gpus := include "dibit.gpus" $pool | int -}}
{{- if eq $gpus 0 -}}
{{- $engines }}
{{- else if ge $gpus $ranks -}}
{{- $perPod := div $gpus $ranks | int -}}
{{- div (add $engines (sub $perPod 1)) $perPod }}
{{- else -}}
{{- if mod $ranks $gpus -}}
{{- fail (printf "pools.%s: tensor_parallel_size %d is no multiple of worker.gpus %d; ranks of one engine would be spread unevenly" $pool.name $ranks $gpus) }}
{{- end -}}
{{- mul $engines (div $ranks $gpus) }}
{{- end }}
{{- end }}

{{/* What `args` of the application is: the very names of serve_config.yaml. */}}
{{- define "dibit.args" -}}
{{- $pools := list -}}
{{- $names := dict "frontend" true -}}
{{- range .Values.pools -}}
{{- if hasKey $names .name -}}
{{- fail (printf "pools: %q is taken, by another pool or by the group of pods that is called frontend" .name) }}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- $pools = append $pools (omit . "worker") -}}
{{- end -}}
{{- $args := dict "model" .Values.model.path "engine" .Values.engine "pools" $pools "ingress" (dict "replicas" .Values.frontend.replicas) -}}
{{- if .Values.model.served_model_name -}}
{{- $_ := set $args "served_model_name" .Values.model.served_model_name -}}
{{- end -}}
{{- if .Values.apiKeys.secret -}}
{{- $_ := set $args "access" (dict "keys_file" (printf "/etc/dibit/keys/%s" .Values.apiKeys.key)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $args (deepCopy .Values.config)) }}
{{- end }}

{{/* "true" if all pools are planned together. */}}
{{- define "dibit.together" -}}
{{- $scaled := 0 -}}
{{- range .Values.pools -}}
{{- $bounds := dig "replicas" 1 . -}}
{{- if kindIs "map" $bounds -}}
{{- if lt (int (dig "min" 1 $bounds)) (int $bounds.max) -}}
{{- $scaled = add $scaled 1 -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $together := .Values.autoscaling.together -}}
{{- or (eq $together "always") (and (eq $together "auto") (gt (int $scaled) 1)) | ternary "true" "" }}
{{- end }}

{{- define "dibit.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: dibit
    route_prefix: /
    import_path: deployments.app:build
    {{- if include "dibit.together" . }}
    autoscaling_policy: {policy_function: "deployments.autoscaling:ApplicationPolicy"}
    {{- end }}
    args:
      {{- include "dibit.args" . | nindent 6 }}
{{- end }}
