"""``dibit env``: what this machine has, and which kernels Dibit would run on it."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from engine.execution.machine import available_cores
from kernels import choice

PACKAGES = ("dibit", "torch", "triton", "ray", "numpy", "numba", "vllm-flash-attn", "transformers")
"""Distributions whose versions a report of a problem should give."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that an engine can run on, with what runs there.

    Attributes:
        name: torch's, such as "cuda:0".
        model: what it is.
        memory_bytes: of a GPU.
        capability: compute capability of a GPU, such as "9.0".
        kernels: a row for each operation and weight format.
    """

    name: str
    model: str
    memory_bytes: int | None
    capability: str | None
    kernels: list[choice.Choice]


def run_env(*, as_json: bool) -> None:
    """Print versions, devices, threads and the choice of kernels."""
    versions = {name: _version(name) for name in PACKAGES}
    threads = _threads()
    devices = [_cpu(), *(_gpu(index) for index in range(torch.cuda.device_count()))]
    if as_json:
        record = {
            "python": platform.python_version(),
            "system": platform.platform(),
            "versions": versions,
            "cuda": torch.version.cuda,
            "threads": threads,
            "devices": [dataclasses.asdict(device) for device in devices],
        }
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        _show(versions, threads, devices)


def _show(versions: dict[str, str | None], threads: dict[str, int], devices: list[Device]) -> None:
    console = Console(highlight=False)
    console.print(f"Python {platform.python_version()} on {platform.platform()}", soft_wrap=True)
    shown = (f"{name} {version or 'not installed'}" for name, version in versions.items())
    console.print(f"{', '.join(shown)}, CUDA {torch.version.cuda or 'none'}", soft_wrap=True)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in threads.items()), soft_wrap=True)
    if not torch.cuda.is_available():
        console.print("torch sees no GPU.")
    for device in devices:
        size = "" if device.memory_bytes is None else f", {device.memory_bytes / 1e9:.1f} GB"
        capability = "" if device.capability is None else f", compute capability {device.capability}"
        table = Table("what", "runs", "why", title=f"{device.name}: {device.model}{size}{capability}")
        for row in device.kernels:
            table.add_row(row.subject, row.implementation, row.reason)
        console.print(table)


def _cpu() -> Device:
    capability = torch.backends.cpu.get_cpu_capability()
    return Device("cpu", f"{platform.machine()}, {capability}", None, None, choice.describe(torch.device("cpu")))


def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        f"cuda:{index}",
        properties.name,
        properties.total_memory,
        f"{properties.major}.{properties.minor}",
        choice.describe(torch.device("cuda", index)),
    )


def _threads() -> dict[str, int]:
    # The CPU's kernels for packed weights run in torch's threads too.
    return {"cores": available_cores(), "torch_threads": torch.get_num_threads()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
