"""``dibit plan`` as a user runs it, and the files it writes."""

from __future__ import annotations

import json
import shlex
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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--table"],
        ["--gpu", "A100-80G", "--concurrency", "100"],
        ["--gpu", "8xH20-141G", "--gpu", "13xA100-80G", "--concurrency", "100"],
    ],
)
def test_tables_fit_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = plan(capsys, BIG, *arguments)
    assert "…" not in text  # what rich puts where a column is too narrow
    assert max(map(len, text.splitlines())) <= 80


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


@pytest.mark.parametrize("target", ["serve-config", "helm-values"])
@pytest.mark.parametrize(
    "arguments",
    [
        [BIG, "--concurrency", "300", "--kv-dtype", "int8", "--gpu", "A100-80G"],
        [BIG, "--format", "tight", "--weights", "/models/my model", "--context", "4096", "--gpu", "H20-96G"],
        [BIG, "--gpu", "8 x H20-141G", "--gpu", "4xA100-80G", "--concurrency", "90"],
        ["qwen2.5-72b", "--weights", "/q", "--bits", "3", "--quantize-embeddings", "int8", "--enforce-eager"],
    ],
)
def test_an_emitted_file_says_how_to_make_it_again(
    capsys: pytest.CaptureFixture[str], arguments: list[str], target: str
) -> None:
    text = plan(capsys, *arguments, "--emit", target)
    first = text.splitlines()[0].removeprefix("# Written by: ")
    program, command, *again = shlex.split(first)
    assert (program, command) == ("dibit", "plan")
    assert plan(capsys, *again) == text


def test_a_model_of_short_contexts_is_planned_with_these(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 at once with 2,048 tokens each" in plan(capsys, str(TINY), "--gpu", "L20")


@pytest.mark.parametrize(("concurrency", "seqs"), [(1, 64), (100, 100), (2000, 256)])
def test_engines_take_as_many_sequences_as_were_planned(
    capsys: pytest.CaptureFixture[str], concurrency: int, seqs: int
) -> None:
    arguments = [BIG, "--concurrency", str(concurrency), "--context", "2048", "--gpu", "H200", "--emit", "serve-config"]
    (application,) = yaml.safe_load(plan(capsys, *arguments))["applications"]
    config = AppConfig.model_validate(application["args"])
    (pool,) = config.pools
    assert config.engine.get("max_num_seqs", 64) == seqs
    assert pool.replicas.min * seqs >= concurrency


def test_cards_that_are_there_become_pools(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [BIG, "--gpu", "8xH20-141G", "--gpu", "13xA100-80G", "--concurrency", "100"]
    (application,) = yaml.safe_load(plan(capsys, *arguments, "--emit", "serve-config"))["applications"]
    pools = AppConfig.model_validate(application["args"]).pools
    used = {pool.accelerator_type: pool.replicas.min * pool.tensor_parallel_size for pool in pools}
    assert used == {"H20": 8, "A100": 12}
    text = plan(capsys, *arguments)
    assert "Not used: 1 x A100-80G" in text
    assert "100 wanted" in text


def test_integers_are_made_of_published_weights_while_loading(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, BIG, "--format", "wint4", "--gpu", "A100-80G", "--emit", "serve-config")
    (application,) = yaml.safe_load(text)["applications"]
    assert application["args"]["model"] == "baidu/ERNIE-4.5-300B-A47B-PT"
    assert application["args"]["engine"]["quantization"] == "wint4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([BIG, "--gpu", "5090"], "known are"),
        ([BIG, "--gpu", "8xH100", "--gpu", "A100-80G"], "with all of them"),
        ([BIG, "--gpu", "8xH100", "--gpu", "4xH100-80G"], "there twice"),
        ([BIG, "--gpu", "8xH20-141G", "--gpu", "8xH20-96G", "--emit", "helm-values"], "apart by their type"),
        ([BIG, "--format", "wint3"], "none of"),
        ([BIG, "--quantize-embeddings", "wint4"], "none of bf16, int8, int4"),
        ([BIG, "--context", "1000000"], "exceeds the model's 131072"),
        (["qwen2.5-72b", "--format", "bpdq", "--emit", "serve-config"], "--weights"),
        ([BIG, "--gpu", "3090", "--format", "bf16", "--emit", "serve-config"], "fit no engine"),
        ([BIG, "--gpu", "999GB, 2.0TB/s, 312TFLOPs", "--emit", "helm-values"], "no name that Ray knows"),
        (["no-such-model"], "Built-in models"),
        (["qwen2.5-72b", "--format", "bpdq", "--group-size", "100"], "--group-size: 100"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
