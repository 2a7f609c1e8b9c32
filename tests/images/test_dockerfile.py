"""The images' recipe: what a linter says of it, and what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    """The recipe's instructions, in order."""
    return list(DockerfileParser(path=str(ROOT)).structure)


def test_hadolint_has_no_complaint() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_stage_comes_from_the_base_that_a_digest_can_pin(steps: list[dict[str, Any]]) -> None:
    stages: set[str] = set()
    for step in steps:
        if step["instruction"] == "FROM":
            source, _, name = step["value"].partition(" AS ")
            assert source == "${BASE}" or source in stages, step["value"]
            stages.add(name)
    assert {"cpu", "cuda"} <= stages


def test_what_serves_is_not_root(steps: list[dict[str, Any]]) -> None:
    stage, users = "", {}
    for step in steps:
        if step["instruction"] == "FROM":
            source, _, stage = step["value"].partition(" AS ")
            users[stage] = users.get(source, "0")
        elif step["instruction"] == "USER":
            users[stage] = step["value"].split(":")[0]
    assert users["cpu"] == users["cuda"] == "1000"  # the chart's podSecurityContext.runAsUser


def test_images_hold_no_weights_but_the_example(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step["instruction"] == "COPY" and not step["value"].startswith("--from"):
            *sources, _ = step["value"].split()
            for source in sources:
                files = list((ROOT / source).rglob("*.safetensors"))
                assert source == "examples/ernie-tiny/2bits" or not files, source


def test_everything_copied_reaches_the_builder(steps: list[dict[str, Any]]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        source
        for step in steps
        if step["instruction"] == "COPY" and not step["value"].startswith("--from")
        for source in step["value"].split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_compose_confines_its_services() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"cpu", "gpu"}
    for name, service in services.items():
        assert service["build"]["target"] == {"cpu": "cpu", "gpu": "cuda"}[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
