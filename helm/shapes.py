"""What a value of the chart may be, beyond what its default tells: the syntax of Kubernetes' names and quantities,
words to choose from, and bounds.

Kubernetes itself looks at a pod's template only when KubeRay makes the pod, and says what is wrong in an event of the
RayCluster; a value refused here is refused while somebody watches.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

CHOICES: dict[str, list[str]] = {
    "autoscaling.together": ["auto", "always", "never"],
    "image.pullPolicy": ["Always", "IfNotPresent", "Never"],
    "model.cache.type": ["pvc", "hostPath", "image", "emptyDir"],
    "ray.autoscaler.upscalingMode": ["Default", "Conservative", "Aggressive"],
    "ray.upgrade.type": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"],
    "service.type": ["ClusterIP", "NodePort", "LoadBalancer"],
}

NAME = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"
"""Of an object (a DNS subdomain), or nothing."""
FILE = r"^[A-Za-z0-9._-]+$"
"""Key in a Secret."""
ADDRESS = r"^(https?://\S+)?$"
HOST = r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
QUANTITY = r"^\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?$"
LABEL = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
LABEL_KEY = r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
ACCELERATOR = r"^[A-Za-z0-9._-]+$"
"""It becomes a part of a command line, within quotes."""
PATTERNS = {
    "apiKeys.key": FILE,
    "apiKeys.secret": NAME,
    "image.digest": r"^(sha256:[0-9a-f]{64})?$",
    "image.repository": r"^[\w.:/-]+$",
    "image.tag": r"^[\w.-]*$",
    "ingress.className": NAME,
    "ingress.tlsSecret": NAME,
    "model.cache.hostPath.path": r"^/",
    "model.cache.mountPath": r"^/[^\s:]*$",
    "model.cache.pvc.existingClaim": NAME,
    "model.cache.pvc.size": QUANTITY,
    "model.cache.pvc.storageClassName": NAME,
    "model.hub.endpoint": ADDRESS,
    "model.hub.tokenKey": FILE,
    "model.hub.tokenSecret": NAME,
    "model.path": r".",
    "monitoring.podMonitor.interval": r"^\d+(ms|s|m|h)$",
    "pools.worker.gpuResource": LABEL_KEY,
    "ray.auth.secret": NAME,
    "ray.gcsFaultTolerance.passwordKey": FILE,
    "ray.gcsFaultTolerance.passwordSecret": NAME,
    "ray.gcsFaultTolerance.redis.image": r"^\S+$",
    "ray.gcsFaultTolerance.redis.size": QUANTITY,
    "ray.gcsFaultTolerance.redis.storageClassName": NAME,
    "ray.gcsFaultTolerance.redisAddress": r"^((rediss?://)?[^\s:/]+:\d+)?$",
    "ray.upgrade.gatewayClassName": NAME,
    "ray.version": r"^\d+\.\d+\.\d+$",
    "serviceAccount.name": NAME,
    "test.apiKeyKey": FILE,
    "test.apiKeySecret": NAME,
    "test.url": ADDRESS,
}
NAMED = {"priorityClassName": NAME, "runtimeClassName": NAME, "sharedMemory": QUANTITY}
"""The same by the last part of a path."""

LARGEST_NUMBER = 2**31 - 1
"""As Kubernetes' own; far larger ones a template writes as 1e+12."""
LARGEST = {
    "service.port": 65535,
    "ray.upgrade.maxSurgePercent": 100,
    "ray.upgrade.stepSizePercent": 100,
}
MOST_REPLICAS = 10_000
"""Of a pool; pods are engines times what one takes, and that must stay a number of Kubernetes'."""
POSITIVE = {
    "monitoring.prometheusRule.tpotSeconds",
    "monitoring.prometheusRule.ttftSeconds",
    "ray.upgrade.intervalSeconds",
    "ray.upgrade.stepSizePercent",
    "service.port",
    "test.timeoutSeconds",
}
"""Values of which zero makes no sense."""


def _object(*required: str, optional: str = "") -> Schema:
    """An object of Kubernetes that has these keys and no other; what is in them, Kubernetes checks."""
    keys = [*required, *optional.split()]
    return {"type": "object", "additionalProperties": False, "properties": {key: {} for key in keys}} | (
        {"required": list(required)} if required else {}
    )


TEXT = {"type": "string", "minLength": 1}
KEY = {"pattern": LABEL_KEY}
WORDS = {"type": "object", "propertyNames": KEY, "additionalProperties": {"type": "string"}}
LABELS = {"type": "object", "propertyNames": KEY, "additionalProperties": {"type": "string", "pattern": LABEL}}
AMOUNTS = {
    "type": "object",
    "propertyNames": KEY,
    "additionalProperties": {"type": ["string", "number"], "pattern": QUANTITY, "minimum": 0},
}
VOLUMES = "hostPath emptyDir persistentVolumeClaim configMap secret projected csi nfs image ephemeral"
SHAPES: dict[str, Schema] = {
    "annotations": WORDS,
    "labels": LABELS,
    "nodeSelector": LABELS,
    "resources": {
        **_object(optional="requests limits claims"),
        "properties": {"requests": AMOUNTS, "limits": AMOUNTS, "claims": {"type": "array"}},
    },
    "affinity": _object(optional="nodeAffinity podAffinity podAntiAffinity"),
    "podSecurityContext": {"type": "object"},
    "containerSecurityContext": {"type": "object"},
}
"""Kubernetes' own objects, by the last part of their path. Security contexts are whole in Kubernetes' hands."""

PEER = _object(optional="podSelector namespaceSelector ipBlock")
TOLERATION = _object(optional="key operator value effect tolerationSeconds")
SPREAD = _object(
    "maxSkew",
    "topologyKey",
    "whenUnsatisfiable",
    optional="labelSelector matchLabelKeys minDomains nodeAffinityPolicy nodeTaintsPolicy",
)
VARIABLE = _object("name", optional="value valueFrom")
VARIABLE["properties"] = {
    "name": {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_.-]*$"},
    "value": {"type": "string"},
    "valueFrom": {"type": "object"},
}
SECRET = _object("name")
SECRET["properties"] = {"name": TEXT | {"pattern": NAME}}
VOLUME = _object("name", optional=VOLUMES) | {"minProperties": 2, "maxProperties": 2}
VOLUME["properties"]["name"] = TEXT | {"pattern": NAME}
ITEMS: dict[str, Schema] = {
    "pullSecrets": SECRET,
    "accessModes": {"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]},
    "tolerations": TOLERATION,
    "topologySpreadConstraints": SPREAD,
    "env": VARIABLE,
    "volumes": VOLUME,
    "volumeMounts": _object("name", "mountPath", optional="readOnly subPath subPathExpr mountPropagation"),
    "hosts": {"type": "string", "pattern": HOST},
    "hostnames": {"type": "string", "pattern": HOST},
    "parentRefs": _object("name", optional="namespace sectionName port group kind"),
    "clients": PEER,
    "monitoring": PEER,
    "operator": PEER,
}
"""What is in a list, by the last part of its path."""
NEVER_EMPTY = {"accessModes", "hosts"}
"""Lists that Kubernetes wants something in."""
