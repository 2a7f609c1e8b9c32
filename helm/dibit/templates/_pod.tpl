{{/*
The pod of a Ray node. A dictionary: root, path (of the group's values), component, container (its name), sharedMemory,
ports, and of the group's values: resources, env, volumes, volumeMounts, nodeSelector, tolerations, affinity, topologySpreadConstraints,
priorityClassName, runtimeClassName, annotations.

No probes stand here, so that KubeRay adds its own (initLivenessAndReadinessProbe in its pod.go): they ask Ray's agent
whether the node is well, and of a worker's readiness Serve's proxy besides. Engines load inside actors, so a node is
well meanwhile. It also adds the start command, the restart policy and a container that waits for the head.
*/}}
{{- define "dibit.pod" -}}
{{- $root := .root -}}
{{- $cache := $root.Values.model.cache -}}
{{- $models := $cache.mountPath | trimSuffix "/" -}}
{{- $folders := list "" "/tmp" "/home/dibit" "/dev/shm" "/etc/dibit/keys" -}}
{{- include "dibit.checkOnce" (list "model.cache" "mountPath" (list $cache) $folders) -}}
{{- include "dibit.checkOnce" (list (printf "%s.volumeMounts" .path) "mountPath" .volumeMounts (append $folders $models)) -}}
{{- $volumes := list "tmp" "home" "shared-memory" "models" "api-keys" -}}
{{- include "dibit.checkOnce" (list (printf "%s.volumes" .path) "name" .volumes $volumes) -}}
{{- range .volumes -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- range .volumeMounts -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "%s.volumeMounts: there is no volume %q" $.path .name) -}}
{{- end -}}
{{- end -}}
{{- include "dibit.checkOnce" (list (printf "%s.env" .path) "name" .env list) -}}
{{- $own := dict "HOME" "/home/dibit" "RAY_USAGE_STATS_ENABLED" "0" "HF_HOME" (printf "%s/hub" $models) "TRITON_CACHE_DIR" "/tmp/triton" "NUMBA_CACHE_DIR" "/tmp/numba" -}}
{{- with $root.Values.model.hub.endpoint -}}
{{- $_ := set $own "HF_ENDPOINT" . -}}
{{- end -}}
{{- if $root.Values.frontend.haproxy -}}
{{- /* Serve's controller, proxies and replicas all read it. Its files are below /tmp/haproxy-serve. */ -}}
{{- $_ := set $own "RAY_SERVE_ENABLE_HA_PROXY" "1" -}}
{{- end -}}
{{- if ne .component "head" -}}
{{- /* Ray's own is 30 s, whatever the pod is given. The rest is for processes to end. */ -}}
{{- $_ := set $own "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" (sub (int $root.Values.terminationGracePeriodSeconds) 15 | max 0 | toString) -}}
{{- end -}}
{{- /* A name may stand there once, and the group's own value wins. */ -}}
{{- $given := dict -}}
{{- range .env -}}
{{- $_ := set $given .name true -}}
{{- $_ := unset $own .name -}}
{{- end -}}
metadata:
  labels:
    {{- include "dibit.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component | quote }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "dibit.serviceAccount" $root }}
  {{- if ne .component "head" }}
  automountServiceAccountToken: false
  {{- end }}
  terminationGracePeriodSeconds: {{ int $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .topologySpreadConstraints }}
  {{- $own := dict "matchLabels" (merge (dict "app.kubernetes.io/component" $.component) (include "dibit.selector" $root | fromYaml)) }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml (hasKey . "labelSelector" | ternary . (set (deepCopy .) "labelSelector" $own)) | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "dibit.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- toYaml $root.Values.containerSecurityContext | nindent 8 }}
      ports:
        {{- toYaml .ports | nindent 8 }}
      env:
        {{- range $name, $value := $own }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
        {{- if and $root.Values.model.hub.tokenSecret (not (hasKey $given "HF_TOKEN")) }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ $root.Values.model.hub.tokenSecret | quote }}, key: {{ $root.Values.model.hub.tokenKey | quote }}}
        {{- end }}
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/dibit}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: models, mountPath: {{ $models | quote }}, readOnly: {{ or $cache.readOnly (eq $cache.type "image") }}}
        {{- if $root.Values.apiKeys.secret }}
        - {name: api-keys, mountPath: /etc/dibit/keys, readOnly: true}
        {{- end }}
        {{- with .volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}
    - name: models
      {{- if eq $cache.type "pvc" }}
      persistentVolumeClaim:
        claimName: {{ $cache.pvc.existingClaim | default (printf "%s-models" (include "dibit.fullname" $root)) }}
      {{- else if eq $cache.type "hostPath" }}
      hostPath: {path: {{ $cache.hostPath.path | quote }}, type: DirectoryOrCreate}
      {{- else if eq $cache.type "image" }}
      image: {reference: {{ required "model.cache.image.reference is empty; model.cache.type image needs the image's name" $cache.image.reference | quote }}, pullPolicy: IfNotPresent}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- if $root.Values.apiKeys.secret }}
    - name: api-keys
      secret: {secretName: {{ $root.Values.apiKeys.secret | quote }}}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
