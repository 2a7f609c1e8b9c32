"""Pools on a cluster of several nodes: where the ranks go, and that the engines answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("place_pools.py")
ROOT = SCRIPT.parents[2]


def test_ranks_share_a_node_if_one_has_room_and_spread_if_none_has(tmp_path: Path) -> None:
    # In a process of its own: it has a Ray cluster of its own, and there may be another one in this process.
    out = tmp_path / "pools.json"
    command = [sys.executable, str(SCRIPT), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "deployments")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    h20, a100 = result["places"]["h20"], result["places"]["a100"]
    assert len(h20) == len(a100) == 2
    assert h20[0] == h20[1] == result["nodes"]["H20"][0]
    assert sorted(a100) == sorted(result["nodes"]["A100"])
    assert result["answers"]["h20"] == result["answers"]["a100"] == result["expected"]
    assert result["gpus_in_use"] == 4
