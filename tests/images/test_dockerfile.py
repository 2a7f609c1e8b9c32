"""The images' recipe: what a linter says of it, and what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deployments.cli import app
from deployments.commands.serve import ServeOverrides, read_plan
from tests.images.recipe import ROOT, inherited, lineage, stages

TARGETS = ("cpu", "cuda")
STEPS = [(stage.name, step) for stage in stages().values() for step in stage.steps]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_hadolint_has_no_complaint() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_stage_comes_from_the_base_that_a_digest_can_pin() -> None:
    seen: set[str] = set()
    for stage in stages().values():
        assert stage.base == "${BASE}" or stage.base in seen, stage
        assert all(source in seen for step in stage.steps for source in step.stages)
        seen.add(stage.name)
    assert set(TARGETS) <= seen


def test_nothing_is_named_latest() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    base = re.search(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert base is not None
    images = [base[1], *(service["image"] for service in SERVICES.values())]
    for image in images:
        name, _, tag = image.partition(":")
        assert name
        assert tag
        assert tag != "latest"


@pytest.mark.parametrize("target", TARGETS)
def test_what_serves_is_not_root(target: str) -> None:
    assert next(inherited(target, "USER")).split(":")[0] == "1000"  # the chart's podSecurityContext.runAsUser


@pytest.mark.parametrize("target", TARGETS)
def test_images_ask_for_no_gpu(target: str) -> None:
    """NVIDIA's runtime gives a container what NVIDIA_VISIBLE_DEVICES names; a pod without a GPU would get all."""
    assert not any("NVIDIA_VISIBLE_DEVICES" in value for value in inherited(target, "ENV"))


def test_lists_of_packages_are_not_kept() -> None:
    for name, step in STEPS:
        if step.kind == "RUN" and "apt-get install" in step.value:
            assert "rm -rf /var/lib/apt/lists/*" in step.value, name
            assert "--no-install-recommends" in step.value, name


def test_downloads_are_not_kept() -> None:
    for name, step in STEPS:
        if step.kind == "RUN" and re.search(r"\bpip (install|wheel)\b", step.value):
            cached = any("type=cache,target=/root/.cache/pip" in flag for flag in step.flags)
            assert cached or "--no-cache-dir" in step.value, name


def test_arguments_and_environment_hold_no_secret() -> None:
    for name, step in STEPS:
        if step.kind in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?<!PUBLIC_)KEY\b", step.value, re.IGNORECASE), name


def test_everything_is_copied_by_name() -> None:
    for name, step in STEPS:
        assert step.kind != "ADD", name
        for source in step.sources:
            assert "*" not in source, name
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_the_sources_installs_no_dependency_again(target: str) -> None:
    """What reads the sources, and all that is built on it, only installs the package itself."""
    rooms = {"kernels", "engine", "deployments"}
    dirty: set[str] = set()
    for stage in lineage(target):
        touched = stage.base in dirty
        for step in stage.steps:
            touched |= bool(rooms & set(step.sources)) or bool(dirty & set(step.stages))
            if touched and step.kind == "RUN":
                assert "--no-deps" in step.value, stage.name
        if touched:
            dirty.add(stage.name)
    assert target in dirty


def test_images_hold_no_weights_but_the_example() -> None:
    for _, step in STEPS:
        for source in step.sources:
            files = list((ROOT / source).rglob("*.safetensors"))
            assert source == "examples/ernie-tiny/2bits" or not files, source


def test_everything_copied_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    assert {source for _, step in STEPS for source in step.sources} == let_in


def test_extras_that_the_images_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [extras for _, step in STEPS for extras in re.findall(r'"\.\[([\w,]+)\]"', step.value)]
    assert asked
    for extras in asked:
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "command",
    [
        *(pytest.param(json.loads(next(inherited(target, "CMD"))), id=target) for target in TARGETS),
        *(pytest.param(service["command"], id=f"compose {name}") for name, service in SERVICES.items()),
    ],
)
def test_commands_listen_where_a_published_port_leads(command: list[str]) -> None:
    program, verb, *arguments = command
    assert (program, verb) == ("dibit", "serve")
    serve = typer.main.get_command(app).get_command(None, verb)  # type: ignore[union-attr,arg-type]
    options = serve.make_context(verb, arguments).params
    assert options["host"] == "0.0.0.0"
    plan = read_plan(ROOT / "serve_config.yaml", ServeOverrides(host=options["host"]))
    assert (plan.host, plan.port) == ("0.0.0.0", 8000)


def test_compose_confines_its_services() -> None:
    assert set(SERVICES) == {"cpu", "gpu"}
    for name, service in SERVICES.items():
        assert service["build"]["target"] == {"cpu": "cpu", "gpu": "cuda"}[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_lets_launchers_run_from_the_folders_in_memory() -> None:
    for service in SERVICES.values():
        for folder in service["tmpfs"]:
            assert "exec" in folder.partition(":")[2].split(","), folder
