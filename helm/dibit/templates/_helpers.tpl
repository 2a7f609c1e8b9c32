{{- define "dibit.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Short enough that KubeRay's suffixes fit a label (it takes 47 characters), and a name that it takes at all. */}}
{{- define "dibit.fullname" -}}
{{- $name := printf "%s-%s" .Release.Name (include "dibit.name" .) -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains (include "dibit.name" .) .Release.Name -}}
{{- $name = .Release.Name -}}
{{- end -}}
{{- $name = $name | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%q can name no RayService: it needs a letter first, then letters, digits and hyphens; set fullnameOverride" $name) -}}
{{- end -}}
{{- $name }}
{{- end }}

{{/*
What all pods of the release have. Without app.kubernetes.io/name: KubeRay gives Ray's pods one of its own, by which
the Service of the head finds its pod.
*/}}
{{- define "dibit.selector" -}}
app.kubernetes.io/part-of: {{ include "dibit.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Of objects; not of pods, which another version of the chart alone would restart. */}}
{{- define "dibit.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: {{ include "dibit.name" . | quote }}
{{ include "dibit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The same with more of them, which win: list of the root and the labels. */}}
{{- define "dibit.labelsWith" -}}
{{- toYaml (merge (deepCopy (index . 1)) (include "dibit.labels" (index . 0) | fromYaml)) }}
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
{{- $min := int (dig "min" 1 .) -}}
{{- if gt $min (int .max) -}}
{{- fail (printf "replicas, of a pool or the frontend, or frontend.workers: bounds from %d to %d: min exceeds max" $min (int .max)) }}
{{- end -}}
{{- $initial := kindIs "invalid" .initial | ternary $min .initial | int -}}
{{- if or (lt $initial $min) (gt $initial (int .max)) -}}
{{- fail (printf "replicas: bounds from %d to %d: initial (%d) is not within them" $min (int .max) $initial) }}
{{- end -}}
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

{{/* Refuse GPUs that are said in the wrong place, or not at all: the engines would wait for ever, or run on the CPU. */}}
{{- define "dibit.checkGpus" -}}
{{- $worker := .worker | default dict -}}
{{- if and .accelerator_type (hasKey $worker "gpus") (not $worker.gpus) -}}
{{- fail (printf "pools.%s: worker.gpus is 0, and accelerator_type %s asks for GPUs" .name .accelerator_type) -}}
{{- else if and $worker.gpus (not .accelerator_type) -}}
{{- fail (printf "pools.%s: worker.gpus is %d, and without accelerator_type the engines run on the CPU; name the GPU (H20, A100, ...)" .name (int $worker.gpus)) -}}
{{- end -}}
{{- $resource := $worker.gpuResource | default "nvidia.com/gpu" -}}
{{- if or (hasKey (dig "resources" "limits" dict $worker) $resource) (hasKey (dig "resources" "requests" dict $worker) $resource) -}}
{{- fail (printf "pools.%s: worker.resources has %s; worker.gpus says how many there are" .name $resource) -}}
{{- end -}}
{{- end }}

{{/*
Refuse what Kubernetes refuses, which would only be seen in KubeRay's events: list of the value's path, the key, the
items, and what is taken.
*/}}
{{- define "dibit.checkOnce" -}}
{{- $path := index . 0 -}}
{{- $key := index . 1 -}}
{{- $taken := index . 3 -}}
{{- range index . 2 -}}
{{- $one := get . $key | trimSuffix "/" -}}
{{- if has $one $taken -}}
{{- fail (printf "%s: %s %q is taken, by another or by the chart itself" $path $key (get . $key)) -}}
{{- end -}}
{{- $taken = append $taken $one -}}
{{- end -}}
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

{{/* Engines of a pool that one pod holds; 0 if one engine takes several pods. */}}
{{- define "dibit.perPod" -}}
{{- $gpus := include "dibit.gpus" . | int -}}
{{- eq $gpus 0 | ternary 1 (div $gpus (dig "tensor_parallel_size" 1 . | int)) }}
{{- end }}

{{/* CPUs that Ray counts in a pod, as KubeRay reads them (rounded up, limits first); empty if nothing says. */}}
{{- define "dibit.cpus" -}}
{{- $worker := .worker | default dict -}}
{{- $cpu := dig "resources" "limits" "cpu" (dig "resources" "requests" "cpu" "" $worker) $worker | toString -}}
{{- if $worker.rayCpus -}}
{{- $worker.rayCpus }}
{{- else if hasSuffix "m" $cpu -}}
{{- divf (trimSuffix "m" $cpu) 1000 | ceil }}
{{- else if $cpu -}}
{{- ceil $cpu }}
{{- end }}
{{- end }}

{{/* Refuse a pod in which Ray has too few CPUs for its engines: the last of them would wait for ever. */}}
{{- define "dibit.checkCpus" -}}
{{- $perPod := include "dibit.perPod" . | int -}}
{{- $ranks := dig "tensor_parallel_size" 1 . | int -}}
{{- $inPod := gt $perPod 0 | ternary (mul $perPod $ranks) (include "dibit.gpus" . | int) -}}
{{- $rank := .num_cpus | default (.accelerator_type | empty | ternary 0.25 1.0) -}}
{{- $asked := addf (mulf $inPod $rank) (mulf 0.1 (max 1 $perPod)) -}}
{{- $cpus := include "dibit.cpus" . -}}
{{- if and $cpus (gt $asked (float64 $cpus)) -}}
{{- fail (printf "pools.%s: Ray has %s CPU(s) in a pod (worker.rayCpus, or worker.resources), and the engines in it ask for %v: %d rank(s) of %v and 0.1 for each engine" .name $cpus $asked $inPod $rank) }}
{{- end -}}
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
{{- include "dibit.checkGpus" . -}}
{{- include "dibit.checkCpus" . -}}
{{- $pool := omit . "worker" -}}
{{- if eq (include "dibit.perPod" .) "0" -}}
{{- if eq (dig "across_nodes" true .) false -}}
{{- fail (printf "pools.%s: across_nodes is false, and no pod has the %d GPUs of an engine (worker.gpus is %s)" .name (int .tensor_parallel_size) (include "dibit.gpus" .)) }}
{{- end -}}
{{- /* Said, because before the first pod is there nothing else tells the application. */ -}}
{{- $_ := set $pool "across_nodes" true -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
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

{{/* Names of pools of different GPUs whose pods look for the same nodes, where either would take the other's. */}}
{{- define "dibit.sameNodes" -}}
{{- $seen := dict -}}
{{- $same := list -}}
{{- range .Values.pools -}}
{{- if .accelerator_type -}}
{{- $worker := .worker | default dict -}}
{{- $place := list $worker.nodeSelector $worker.affinity $worker.gpuResource | toJson -}}
{{- $other := get $seen $place -}}
{{- if and $other (ne $other.accelerator_type .accelerator_type) -}}
{{- $same = concat $same (list $other.name .name) -}}
{{- end -}}
{{- $_ := set $seen $place . -}}
{{- end -}}
{{- end -}}
{{- $same | uniq | join " and " }}
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

{{/* "true" if KubeRay makes the Gateway and the Services itself, and none by the name given to it. */}}
{{- define "dibit.incremental" -}}
{{- $upgrade := .Values.ray.upgrade -}}
{{- if eq $upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $upgrade.gatewayClassName -}}
{{- fail "ray.upgrade.gatewayClassName is empty; NewClusterWithIncrementalUpgrade needs a GatewayClass" }}
{{- else if not .Values.ray.autoscaler.enabled -}}
{{- fail "ray.autoscaler.enabled is false; NewClusterWithIncrementalUpgrade needs the autoscaler" }}
{{- else if gt (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent) -}}
{{- fail "ray.upgrade.stepSizePercent exceeds maxSurgePercent; traffic can't move faster than capacity" }}
{{- else if or .Values.ingress.enabled .Values.httpRoute.enabled -}}
{{- fail "ingress.enabled or httpRoute.enabled: with NewClusterWithIncrementalUpgrade KubeRay makes a Gateway and an HTTPRoute of its own, and no Service that these could name" }}
{{- end -}}
true
{{- end }}
{{- end }}

{{/* A JSON patch of a RayCluster with the bounds of all its groups, in the order of rayservice.yaml. */}}
{{- define "dibit.boundsPatch" -}}
{{- $groups := list (dict "min" (int .Values.frontend.workers.min) "max" (int .Values.frontend.workers.max)) -}}
{{- range .Values.pools -}}
{{- $bounds := include "dibit.bounds" (.replicas | default 1) | fromJson -}}
{{- $groups = append $groups (dict "min" (include "dibit.workers" (list . $bounds.min) | int) "max" (include "dibit.workers" (list . $bounds.max) | int)) -}}
{{- end -}}
{{- $patch := list -}}
{{- range $index, $group := $groups -}}
{{- $path := printf "/spec/workerGroupSpecs/%d" $index -}}
{{- $patch = concat $patch (list (dict "op" "replace" "path" (printf "%s/minReplicas" $path) "value" $group.min) (dict "op" "replace" "path" (printf "%s/maxReplicas" $path) "value" $group.max)) -}}
{{- if not $.Values.ray.autoscaler.enabled -}}
{{- $patch = append $patch (dict "op" "replace" "path" (printf "%s/replicas" $path) "value" $group.max) -}}
{{- end -}}
{{- end -}}
{{- toJson $patch }}
{{- end }}
