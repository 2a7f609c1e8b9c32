from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "dibit"
HELM = Path(sys.executable).parent / "helm"
KUBERAY = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["annotations"]["dibit/kuberay"]
CUSTOM = {
    "RayService": f"rayservice-{KUBERAY}",
    "PodMonitor": "podmonitor-v0.93.0",
    "PrometheusRule": "prometheusrule-v0.93.0",
    "HTTPRoute": "httproute-v1.6.1",
}
"""Schemas of the kinds that Kubernetes itself doesn't have, in data/."""

Objects = dict[tuple[str, str], dict[str, Any]]
"""Rendered objects by kind and name."""


class ChartError(Exception):
    """Helm refused the values; the text is what a user sees."""


def helm(*arguments: str, values: dict[str, Any] | None = None) -> str:
    """Run helm; `values` go in as a further file of values."""
    extra = ["--values", "-"] if values is not None else []
    done = subprocess.run(
        [str(HELM), *arguments, *extra], input=json.dumps(values), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ChartError(done.stderr)
    return done.stdout


def render(
    values: dict[str, Any] | None = None, *, preset: str | None = None, release: str = "test", chart: Path = CHART
) -> Objects:
    """The objects of the chart with a preset, values, or both."""
    chosen = ["--values", str(CHART / preset)] if preset else []
    text = helm("template", release, str(chart), "--namespace", "ml", *chosen, values=values)
    documents = [document for document in yaml.safe_load_all(text) if document]
    objects = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(objects) == len(documents), "two objects of one kind and name"
    return objects


def notes(values: dict[str, Any] | None = None, *, upgrade: bool = False) -> str:
    """What helm says after an installation or an upgrade: NOTES.txt, which `helm template` leaves out."""
    with TemporaryDirectory() as folder:
        chart = Path(folder) / "dibit"
        shutil.copytree(CHART, chart)
        (chart / "templates" / "NOTES.txt").rename(chart / "notes")
        (chart / "templates" / "notes.yaml").write_text('notes: {{ tpl (.Files.Get "notes") . | toJson }}')
        options = ["--is-upgrade"] if upgrade else []
        only = ["--show-only", "templates/notes.yaml"]
        text = helm("template", "test", str(chart), "--namespace", "ml", *only, *options, values=values)
    return str(yaml.safe_load(text)["notes"])


def service(objects: Objects) -> dict[str, Any]:
    """The spec of the RayService."""
    (found,) = [document["spec"] for (kind, _), document in objects.items() if kind == "RayService"]
    return dict(found)


def groups(objects: Objects) -> list[dict[str, Any]]:
    """The head's group and the workers', in their order."""
    cluster = service(objects)["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def serve_config(objects: Objects) -> dict[str, Any]:
    """What Serve is told."""
    return dict(yaml.safe_load(service(objects)["serveConfigV2"]))


def validate(objects: Objects) -> None:
    """Check every object against the schema of its kind, refusing fields that Kubernetes would drop."""
    for (kind, _), document in objects.items():
        once(document)
        if kind in CUSTOM:
            custom(kind).validate(document)
        else:
            kubernetes_validate.validate(document, "1.34", strict=True)


ONCE = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath", "imagePullSecrets": "name"}
"""Lists that are maps to the API server (x-kubernetes-list-map-keys), and their keys."""


def once(node: Any) -> None:
    """Nothing is twice in a list that Kubernetes takes for a map."""
    for item in node if isinstance(node, list) else node.values() if isinstance(node, dict) else []:
        once(item)
    for name, key in ONCE.items() if isinstance(node, dict) else ():
        if isinstance(node.get(name), list):
            found = [item[key] for item in node[name]]
            assert len(set(found)) == len(found), f"{name}: {found}"


@cache
def custom(kind: str) -> jsonschema.Draft202012Validator:
    stored = Path(__file__).parent / "data" / f"{CUSTOM[kind]}.json.gz"
    return jsonschema.Draft202012Validator(closed(json.loads(gzip.decompress(stored.read_bytes()))))


def closed(schema: Any) -> Any:
    """Kubernetes prunes fields it doesn't know; here they are mistakes."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], "pattern": schema.get("pattern", "")}
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema and isinstance(schema.get("type"), str):
        result["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return result
