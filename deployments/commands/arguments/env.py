"""What ``dibit env`` takes."""

from __future__ import annotations

from typing import Annotated

import typer


def show_environment(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine has: versions, devices, and which kernels would run, and why."""
    from deployments.commands.env import run_env

    run_env(as_json=as_json)
