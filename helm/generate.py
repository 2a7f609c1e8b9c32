"""Writes what follows from other files: the chart's README and the schema of its values from ``dibit/values.yaml``, and
its copy of the Grafana dashboard.

    python helm/generate.py            write all
    python helm/generate.py --check    only say whether they are up to date

Types come from the defaults, and those of Dibit's own options from the classes that read them, so that the chart
refuses what the application would refuse.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from shapes import (
    ACCELERATOR,
    CHOICES,
    ITEMS,
    LARGEST,
    LARGEST_NUMBER,
    MOST_REPLICAS,
    NAMED,
    NEVER_EMPTY,
    PATTERNS,
    POSITIVE,
    SHAPES,
)

from deployments.config import AppConfig
from engine.config import EngineConfig

CHART = Path(__file__).resolve().parent / "dibit"
DASHBOARD = CHART.parents[1] / "deployments" / "observability" / "grafana" / "dibit.json"
"""A chart can only hold files of its own folder, so it has a copy."""

ENGINE_ELSEWHERE = ("model", "tensor_parallel_size")
"""Engine options that the chart sets from other values."""

APPLICATION_ELSEWHERE = ("model", "served_model_name", "engine", "pools")
"""Options of the application that have values of their own."""

COMMENT = re.compile(r"^\s*(?:- )?# -- (.*)$")
KEY = re.compile(r"^(\s*)(?:- )?([A-Za-z_]+):")


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    stale = []
    for name, text in generated().items():
        path = CHART / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python helm/generate.py", file=sys.stderr)
    return 1 if check and stale else 0


def generated() -> dict[str, str]:
    """The files' texts, by name."""
    source = (CHART / "values.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(source)
    comments = read_comments(source)
    return {
        "dashboards/dibit.json": DASHBOARD.read_text(encoding="utf-8"),
        "values.schema.json": json.dumps(schema(values, comments), indent=1) + "\n",
        "README.md": readme(values, comments),
    }


def read_comments(source: str) -> dict[str, str]:
    """The ``# --`` line above each key, by the key's path; an item of a list has the path of the list."""
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    waiting = ""
    for line in source.splitlines():
        if found := COMMENT.match(line):
            waiting = found[1]
        elif found := KEY.match(line):
            depth = len(found[1]) + (2 if line.lstrip().startswith("- ") else 0)
            path = [(indent, key) for indent, key in path if indent < depth] + [(depth, found[2])]
            comments[".".join(key for _, key in path)] = waiting
            waiting = ""
    return comments


def schema(values: dict[str, Any], comments: dict[str, str]) -> dict[str, Any]:
    """JSON schema (draft 7) of all values."""
    application = AppConfig.model_json_schema(ref_template="#/definitions/{model}")
    definitions = application["$defs"]
    engine = EngineConfig.model_json_schema(ref_template="#/definitions/{model}")
    for name in ENGINE_ELSEWHERE:
        del engine["properties"][name]
    engine.pop("required", None)
    definitions["Engine"] = engine
    for options in (application, definitions["PoolConfig"]):
        options["properties"]["engine"] = {"$ref": "#/definitions/Engine"}
    definitions.update(engine.pop("$defs", {}))
    bounds = {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": MOST_REPLICAS},
            {"$ref": "#/definitions/ReplicaRange"},
        ]
    }
    definitions["ReplicaRange"]["properties"]["max"]["maximum"] = MOST_REPLICAS

    root = infer(values, "", comments)
    root["properties"]["engine"] = {"$ref": "#/definitions/Engine"}
    pool = definitions["PoolConfig"]
    # What becomes a Kubernetes label and name.
    pool["properties"]["name"]["pattern"] = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
    pool["properties"]["name"]["maxLength"] = 30
    pool["properties"]["accelerator_type"]["anyOf"][0]["pattern"] = ACCELERATOR
    pool["properties"]["resources"]["propertyNames"] = {"not": {"enum": ["CPU", "GPU"]}}
    pool["properties"]["replicas"] = bounds
    pool["properties"]["worker"] = infer(values["pools"][0]["worker"], "pools.worker", comments)
    pool["required"] = ["name"]
    root["properties"]["pools"] = {"type": "array", "minItems": 1, "items": {"$ref": "#/definitions/PoolConfig"}}
    root["properties"]["frontend"]["properties"]["replicas"] = bounds
    root["properties"]["config"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: value for name, value in application["properties"].items() if name not in APPLICATION_ELSEWHERE
        },
    }
    root["properties"]["global"] = {"type": "object"}  # Helm's own, for charts that have this one as a part
    root["definitions"] = dict(sorted(definitions.items()))
    return {"$schema": "http://json-schema.org/draft-07/schema#", **without_defaults(root)}


def infer(value: Any, path: str, comments: dict[str, str]) -> dict[str, Any]:
    """The schema of what looks like this default."""
    result: dict[str, Any] = {}
    if comments.get(path):
        result["description"] = comments[path]
    last = path.rpartition(".")[2]
    if isinstance(value, dict) and last in SHAPES:
        result |= SHAPES[last]
    elif isinstance(value, dict):
        result |= {"type": "object", "additionalProperties": False}
        result["properties"] = {
            key: infer(item, f"{path}.{key}" if path else key, comments) for key, item in value.items()
        }
        if not path.startswith("pools."):  # items of a list are not merged with the defaults
            result["required"] = list(value)  # all are there, unless somebody has set one to null
    elif isinstance(value, list):
        result |= {"type": "array", "items": ITEMS.get(last, {})}
        if last in NEVER_EMPTY:
            result["minItems"] = 1
    elif isinstance(value, bool):
        result["type"] = "boolean"
    elif isinstance(value, (int, float)):
        result["type"] = "integer" if isinstance(value, int) else "number"
        result["exclusiveMinimum" if path in POSITIVE else "minimum"] = 0
        result["maximum"] = LARGEST.get(path, LARGEST_NUMBER)
    else:
        result["type"] = "string"
        if path in CHOICES:
            result["enum"] = CHOICES[path]
        if pattern := PATTERNS.get(path) or NAMED.get(last):
            result["pattern"] = pattern
    return result


def without_defaults(node: Any) -> Any:
    """The same without pydantic's titles and defaults, which would only make the file longer."""
    if isinstance(node, list):
        return [without_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: without_defaults(item) for name, item in value.items()}
        if key in ("properties", "definitions")
        else without_defaults(value)
        for key, value in node.items()
        if key not in ("title", "default")
    }


def readme(values: dict[str, Any], comments: dict[str, str]) -> str:
    """The chart's README: what it makes, and a table of all values."""
    lines = [HEAD, "| value | default | what it is |", "|---|---|---|"]
    for path, comment in comments.items():
        if not comment:
            continue
        node: Any = values
        for key in path.split("."):
            node = node[0] if isinstance(node, list) else node
            node = node[key]
        default = json.dumps(node).replace("|", "\\|")
        shown = path.replace("pools.", "pools[].")
        lines.append(f"| `{shown}` | `{default}` | {comment} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Dibit's Helm chart

Makes a KubeRay `RayService` that serves one model from one or more pools of GPUs, with everything around it: a service
for clients, network policy, disruption budgets, alerts and a dashboard. It needs Kubernetes 1.30 or newer and the
KubeRay operator 1.7.

```sh
helm repo add kuberay https://ray-project.github.io/kuberay-helm/
helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0      # once for each cluster
helm install dibit helm/dibit --values helm/dibit/values-h20-single.yaml \\
  --set image.repository=registry.example.com/dibit
helm test dibit                                                             # asks for one completion
```

Presets: `values-h20-single.yaml`, `values-a100-tp4.yaml`, `values-h20-a100-pools.yaml`, and `values-cpu-demo.yaml` for
a first try without a GPU. An unknown key is an error that names it.

* **Probes** are KubeRay's own, and the chart leaves them in place: liveness asks Ray's agent on each pod, readiness of
  a worker Serve's proxy besides. Engines load inside Ray's actors, so a long load trips neither. A pod without a
  replica of Serve has no proxy and is not ready: it gets no traffic, and holds up no drain.
* **Upgrades**: what restarts pods, what doesn't, and how a running cluster learns new bounds, is in
  [operations](../../docs/operations.md).
* **Argo CD** and others that render away from the cluster: name a Secret in `ray.gcsFaultTolerance.passwordSecret`, or
  each sync makes another password for the bundled Redis.
* **OpenShift** gives out user ids itself: set `podSecurityContext.runAsUser`, `runAsGroup` and `fsGroup` to null.
* **Ports** and who may reach them are in [security](../../docs/security.md).

This page and `values.schema.json` are written by
`python helm/generate.py` from `values.yaml`; options in snake_case are those of `serve_config.yaml`.
"""


if __name__ == "__main__":
    sys.exit(main())
