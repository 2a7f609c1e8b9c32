"""Memory of a server's processes while it works: whether it stays flat."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
_DIGITS = re.compile(r"[0-9a-f]{6,}|\d+")

Sample = dict[str, float]
"""Resident memory in MiB by process."""


def resident_mib(pids: Mapping[int, str]) -> Sample:
    """Resident memory of each process; processes that have just ended are left out."""
    sample: Sample = {}
    for pid, command in pids.items():
        with suppress(OSError, IndexError):
            pages = int((Path("/proc") / str(pid) / "statm").read_text(encoding="ascii").split()[1])
            sample[f"{_name(command)} {pid}"] = pages * _PAGE_MIB
    return sample


def growth(samples: Sequence[tuple[int, Sample]]) -> dict[str, dict[str, Any]]:
    """For each process that lived throughout, how its memory went.

    Args:
        samples: number of requests so far, and the memory then. The first fifth is warming up, and left out.

    Returns:
        By process: first and last MiB, and the slope of the least-squares line in MiB for each 1,000 requests.
    """
    settled = [sample for sample in samples if sample[0] >= samples[-1][0] / 5]
    names = set.intersection(*(set(sample) for _, sample in settled))
    found = {}
    for name in sorted(names):
        points = [(count, sample[name]) for count, sample in settled]
        found[name] = {
            "first_mib": round(points[0][1], 1),
            "last_mib": round(points[-1][1], 1),
            "mib_per_1000_requests": round(1000 * _slope(points), 3),
        }
    return found


def _slope(points: Sequence[tuple[int, float]]) -> float:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def _name(command: str) -> str:
    words = command.split()
    if not words:
        return "?"
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::")
    scripts = [Path(word).name for word in words[:4] if not word.startswith("-")]
    return next((name for name in reversed(scripts) if name.endswith(".py")), scripts[0])
