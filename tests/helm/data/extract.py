"""Takes the schema out of a custom resource definition, without what the checks here don't read: descriptions and CEL.

python tests/helm/data/extract.py ray.io_rayservices.yaml v1 tests/helm/data/rayservice-v1.7.0.json.gz
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

UNREAD = {"description", "x-kubernetes-validations"}


def slim(node: Any, *, named: bool = False) -> Any:
    """The same without the unread keys; below `properties` keys are names of fields, which all stay."""
    if isinstance(node, list):
        return [slim(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: slim(value, named=key == "properties" and not named)
        for key, value in node.items()
        if named or key not in UNREAD
    }


def main(definition: str, version: str, target: str) -> None:
    versions = yaml.safe_load(Path(definition).read_text(encoding="utf-8"))["spec"]["versions"]
    (schema,) = [entry["schema"]["openAPIV3Schema"] for entry in versions if entry["name"] == version]
    Path(target).write_bytes(gzip.compress(json.dumps(slim(schema)).encode(), mtime=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
