from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "dibit"
HELM = Path(sys.executable).parent / "helm"
RAY_SCHEMA = Path(__file__).parent / "data" / "rayservice-v1.7.0.json.gz"
NOT_KUBERNETES = {"RayService", "PodMonitor", "PrometheusRule", "HTTPRoute"}

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


def render(values: dict[str, Any] | None = None, *, preset: str | None = None) -> Objects:
    """The objects of the chart with a preset, values, or both."""
    chosen = ["--values", str(CHART / preset)] if preset else []
    text = helm("template", "test", str(CHART), "--namespace", "ml", *chosen, values=values)
    documents = [document for document in yaml.safe_load_all(text) if document]
    objects = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(objects) == len(documents), "two objects of one kind and name"
    return objects


def service(objects: Objects) -> dict[str, Any]:
    """The spec of the RayService."""
    (found,) = [document["spec"] for (kind, _), document in objects.items() if kind == "RayService"]
    return dict(found)


def serve_config(objects: Objects) -> dict[str, Any]:
    """What Serve is told."""
    return dict(yaml.safe_load(service(objects)["serveConfigV2"]))


def validate(objects: Objects) -> None:
    """Check every object against the schema of its kind, refusing fields that Kubernetes would drop."""
    for (kind, _), document in objects.items():
        if kind == "RayService":
            ray_service().validate(document)
        elif kind not in NOT_KUBERNETES:
            kubernetes_validate.validate(document, "1.34", strict=True)


@cache
def ray_service() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(closed(json.loads(gzip.decompress(RAY_SCHEMA.read_bytes()))))


def closed(schema: Any) -> Any:
    """Kubernetes prunes fields it doesn't know; here they are mistakes."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema and isinstance(schema.get("type"), str):
        result["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return result
