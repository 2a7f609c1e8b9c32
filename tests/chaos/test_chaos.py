"""Engines and ingresses lost at random while clients stream, as ``benchmarks/chaos`` does it for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.chaos.verdict import split_failures
from benchmarks.steady_load import Failure

ROOT = Path(__file__).resolve().parents[2]
KILLS, INGRESS_KILLS, CLIENTS = 5, 2, 3


def test_no_client_notices_deaths_but_that_of_its_own_ingress(tmp_path: Path) -> None:
    # In a process of its own: it has a Ray cluster of its own, and there may be another one in this process.
    out = tmp_path / "chaos.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.chaos",
        f"--kills={KILLS}",
        f"--ingress-kills={INGRESS_KILLS}",
        "--seconds=30",
        f"--clients={CLIENTS}",
        f"--out={out}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["failures"] == []
    assert result["leftovers"] == []
    assert result["recovered"]
    assert sum(result["kills"].values()) == KILLS + INGRESS_KILLS
    assert (result["kills"]["node"], result["kills"]["ingress"]) == (1, INGRESS_KILLS)
    assert result["closed_with_their_ingress"] <= INGRESS_KILLS * CLIENTS
    assert result["served"] > 20


def test_only_what_an_ingress_was_at_is_excused_by_its_death() -> None:
    def failure(request_id: str, began: float, ended: float) -> Failure:
        return Failure(request_id, began, ended, "")

    excused = failure("with it", 9.0, 10.1)
    others = [
        failure("told of by another", 9.0, 10.1),
        failure("over before", 8.0, 9.9),
        failure("begun after", 10.1, 10.2),
        failure("much later", 9.0, 60.0),
    ]
    closed, failed = split_failures(
        [excused, *others], ingress_deaths=[10.0], ended_by_an_ingress={"told of by another", "another"}
    )
    assert (closed, failed) == ([excused], others)
