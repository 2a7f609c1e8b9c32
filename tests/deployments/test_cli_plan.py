"""``dibit plan`` as a user runs it, and the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deployments.cli import main
from deployments.config import AppConfig

TINY = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny" / "2bits"
BIG = "ernie-4.5-300b-a47b"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_json_names_the_least_engine(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(plan(capsys, BIG, "--gpu", "H200", "--context", "32768", "--json"))
    (offer,) = record["offers"]
    assert (offer["cards"], offer["engine"]["tensor_parallel_size"]) == (1, 1)
    assert record["format"] == "wint2"


def test_text_tells_limits_from_promises(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, BIG, "--gpu", "H20-141G")
    assert "limits, not promises" in " ".join(text.split())
    assert "Recommended: 1 x H20-141G" in text


def test_table_has_every_format_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, BIG, "--table")
    for word in ("bf16", "wint8", "wint4", "wint2", "tight", "bpdq", "1K", "128K"):
        assert word in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"memory.{ending}"
    plan(capsys, BIG, "--plot", str(path))
    assert path.stat().st_size > 1000


def test_a_folder_is_planned_as_stored(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(plan(capsys, str(TINY), "--context", "256", "--json"))
    assert record["format"] == "stored"
    assert any("wint2" in part for part in record["fits"][0]["weights"]["parts"])


@pytest.mark.parametrize("concurrency", ["1", "400"])
def test_emitted_serve_config_is_read_back(capsys: pytest.CaptureFixture[str], concurrency: str) -> None:
    arguments = [str(TINY), "--context", "256", "--concurrency", concurrency, "--gpu", "H20-96G"]
    text = plan(capsys, *arguments, "--emit", "serve-config")
    (application,) = yaml.safe_load(text)["applications"]
    config = AppConfig.parse(application["args"])
    record = json.loads(plan(capsys, *arguments, "--json"))
    (pool,) = config.pools
    assert config.engine_config(pool).max_model_len == 256
    assert pool.accelerator_type == "H20"
    assert pool.replicas.min * pool.tensor_parallel_size == record["offers"][0]["cards"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([BIG, "--gpu", "5090"], "known are"),
        ([BIG, "--format", "wint3"], "none of"),
        ([BIG, "--context", "1000000"], "exceeds the model's 131072"),
        (["qwen2.5-72b", "--format", "bpdq", "--emit", "serve-config"], "--weights"),
        ([BIG, "--gpu", "3090", "--format", "bf16", "--emit", "serve-config"], "fit no engine"),
        ([BIG, "--gpu", "999GB, 2.0TB/s, 312TFLOPs", "--emit", "helm-values"], "no name that Ray knows"),
        (["no-such-model"], "Built-in models"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
