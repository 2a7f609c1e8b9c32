"""``dibit env``, as its users run it."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from deployments.cli import main
from kernels import choice


def env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["env", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_report_names_versions_devices_and_reasons(capsys, monkeypatch):
    out = env(capsys, monkeypatch)
    for said in (platform.python_version(), f"torch {torch.__version__}", "cpu:", "the device is a CPU", "fused_moe"):
        assert said in out
    assert ("torch sees no GPU" in out) == (not torch.cuda.is_available())


def test_json_has_a_row_for_every_operation(capsys, monkeypatch):
    record = json.loads(env(capsys, monkeypatch, "--json"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"]["torch_threads"] >= 1
    cpu = record["devices"][0]
    assert cpu["name"] == "cpu"
    rows = {row["subject"]: row for row in cpu["kernels"]}
    assert set(choice.OPERATIONS) <= set(rows)
    assert all(row["reason"] and row["implementation"] for row in rows.values())
    assert rows["paged_attention"]["implementation"] == "kernels.cpu.attention"
