"""Engines lost at random while clients stream, as ``benchmarks/chaos.py`` does it for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KILLS = 7


def test_no_client_notices_that_engines_are_killed(tmp_path: Path) -> None:
    # In a process of its own: it has a Ray cluster of its own, and there may be another one in this process.
    out = tmp_path / "chaos.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.chaos",
        f"--kills={KILLS}",
        "--seconds=30",
        "--clients=4",
        f"--out={out}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["failures"] == []
    assert result["leftovers"] == []
    assert result["recovered"]
    assert sum(result["kills"].values()) == KILLS
    assert result["kills"]["node"] == 1
    assert result["served"] > 20
