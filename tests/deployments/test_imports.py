"""Processes start without what they don't need: seconds of a core and much memory for each of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "ernie-tiny" / "bf16"
ENGINE = f"""
from engine import LLM
with LLM({str(MODEL)!r}, max_model_len=64, max_num_seqs=2, num_threads=1) as llm:
    llm.generate("a")
"""


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import deployments.cli", ["ray", "torch"]),
        ("import deployments.app, deployments.replica, deployments.ingress", ["torch"]),
        (ENGINE, ["torch._dynamo", "ray", "transformers"]),
    ],
    ids=["command", "replica and ingress", "engine"],
)
def test_what_is_not_needed_is_not_imported(program: str, absent: list[str]) -> None:
    program += f"\nimport json, sys; print(json.dumps([name for name in {absent!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
