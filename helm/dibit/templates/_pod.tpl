{{/*
The pod of a Ray node. A dictionary: root, component, container (its name), sharedMemory, ports, and of the group's
values: resources, env, volumes, volumeMounts, nodeSelector, tolerations, affinity, topologySpreadConstraints,
priorityClassName, runtimeClassName, annotations.

No probes stand here, so that KubeRay adds its own (initLivenessAndReadinessProbe in its pod.go): they ask Ray's agent
whether the node is well, and of a worker's readiness Serve's proxy besides. Engines load inside actors, so a node is
well meanwhile. It also adds the start command, the restart policy and a container that waits for the head.
*/}}
{{- define "dibit.pod" -}}
{{- $root := .root -}}
{{- $cache := $root.Values.model.cache -}}
metadata:
  labels:
    {{- include "dibit.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "dibit.serviceAccount" $root }}
  {{- if ne .component "head" }}
  automountServiceAccountToken: false
  {{- end }}
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
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
        - {name: HOME, value: /home/dibit}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: HF_HOME, value: {{ $cache.mountPath }}/hub}
        - {name: TRITON_CACHE_DIR, value: /tmp/triton}
        - {name: NUMBA_CACHE_DIR, value: /tmp/numba}
        {{- with $root.Values.model.hub.endpoint }}
        - {name: HF_ENDPOINT, value: {{ . | quote }}}
        {{- end }}
        {{- with $root.Values.model.hub.tokenSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: {{ $root.Values.model.hub.tokenKey }}}
        {{- end }}
        {{- if $root.Values.frontend.haproxy }}
        # Serve's controller, proxies and replicas all read it. Its files are below /tmp/haproxy-serve.
        - {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
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
        - {name: models, mountPath: {{ $cache.mountPath }}, readOnly: {{ or $cache.readOnly (eq $cache.type "image") }}}
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
      hostPath: {path: {{ $cache.hostPath.path }}, type: DirectoryOrCreate}
      {{- else if eq $cache.type "image" }}
      image: {reference: {{ required "model.cache.image.reference is empty; model.cache.type image needs the image's name" $cache.image.reference }}, pullPolicy: IfNotPresent}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- if $root.Values.apiKeys.secret }}
    - name: api-keys
      secret: {secretName: {{ $root.Values.apiKeys.secret }}}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
