"""Whether other people's programs would understand a command: read by their own parsers where Python has these."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import ray.scripts.scripts as ray_scripts
import ray.serve.scripts as serve_scripts
import yaml
from huggingface_hub.cli import hf
from pip._internal.commands import create_command

from tests.images.recipe import ROOT, stages

FLAGS = {
    "kubectl apply": {"--filename", "-f"},
    "kubectl create": {"--from-file", "--filename", "-f"},
    "kubectl cp": {"--no-preserve"},
    "kubectl delete": set(),
    "kubectl describe": set(),
    "kubectl drain": {"--ignore-daemonsets", "--delete-emptydir-data"},
    "kubectl exec": {"--container"},
    "kubectl get": {"--watch", "--selector", "--output", "--show-labels", "--label-columns"},
    "kubectl logs": {"--follow", "--selector", "--container", "--tail"},
    "kubectl port-forward": set(),
    "kubectl uncordon": set(),
    "kubectl wait": {"--for", "--timeout"},
    "kind load": set(),
    "docker build": {"--target", "--tag", "--build-arg"},
    "docker push": set(),
    "docker run": {"--publish", "--rm", "--gpus", "--volume", "--shm-size"},
    "docker compose": {"--profile", "--build", "--detach"},
}
"""Verbs and flags that we use of programs whose parsers are not at hand, from their manuals."""


def check_click(program: str, arguments: list[str]) -> None:
    """``ray``, ``serve`` and ``hf``: parsed by themselves, without doing anything."""
    command: click.Command = {
        "ray": lambda: ray_scripts.cli,
        "serve": lambda: serve_scripts.cli,
        "hf": lambda: hf.app,
    }[program]()
    parse(command, program, arguments)


def parse(command: click.Command, program: str, arguments: list[str]) -> None:
    """Down to the last subcommand; one without arguments is a mention of it."""
    context: Any = click.Context(command, info_name=program)
    while hasattr(command, "get_command"):
        assert arguments, f"{program}: a command is missing"
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no {program} {name}"
        command = found
        if hasattr(command, "materialize"):  # hf reads its commands' options only now
            command = command.materialize()
    if arguments and "--help" not in arguments:
        command.make_context(command.name, list(arguments), parent=context)


def check_pip(arguments: list[str]) -> None:
    """Flags by pip itself; of our own package, the extras."""
    verb, *rest = arguments
    _, requirements = create_command(verb).parse_args(rest)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in requirements:
        if found := re.fullmatch(r"(?:\.|dibit)\[([\w,]+)\]", requirement):
            assert set(found[1].split(",")) <= set(project["optional-dependencies"]), requirement


def check_flags(program: str, arguments: list[str]) -> None:
    """Verb and flags are among those we know."""
    verb, *rest = arguments
    known = FLAGS[f"{program} {verb}"]
    for word in rest:
        if word == "--":  # a command for somewhere else
            break
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{program} {verb} {word}"


def check_docker(arguments: list[str]) -> None:
    """Stages, arguments, services and profiles are ours."""
    check_flags("docker", arguments)
    if arguments[0] == "build":
        assert arguments[arguments.index("--target") + 1] in stages()
        text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        for flag, value in itertools.pairwise(arguments):
            if flag == "--build-arg":
                assert re.search(rf"^ARG {value.partition('=')[0]}=", text, re.MULTILINE), value
    elif arguments[0] == "compose":
        services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
        profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
        words = [word for word in arguments[1:] if not word.startswith("-")]
        if "--profile" in arguments:
            assert words.pop(0) in profiles
        verb, *names = words
        assert verb in ("up", "down", "logs", "ps")
        assert set(names) <= set(services)


def commented(path: Path) -> list[str]:
    """Commands in the comments of a file: those indented by three blanks."""
    return re.findall(r"^\s*#   (\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
