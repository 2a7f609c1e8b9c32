"""``dibit inspect``, as its users run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deployments.cli import main

TINY = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny"


def inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *arguments])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def silent(tmp_path: Path) -> Path:
    folder = tmp_path / "2bits"
    shutil.copytree(TINY / "2bits", folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"].pop("row_order")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def test_a_sound_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = inspect(capsys, monkeypatch, str(TINY / "2bits"), "--verify")
    assert code == 0
    for said in ("routed experts", "wint2", "wint8", "config.json says so", "Every tensor was read"):
        assert said in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = inspect(capsys, monkeypatch, str(TINY / "2bits"), "--json", "--verify")
    record = json.loads(out)
    assert code == 0
    assert record["problems"] == []
    assert record["bytes_by_rank"] == [sum(record["bytes_by_part"].values())]
    assert {use["part"] for use in record["formats"]} == {"attention", "mlp", "experts"}


def test_the_row_order_is_found_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = silent(tmp_path)
    code, out, _ = inspect(capsys, monkeypatch, str(folder))
    assert code == 0
    assert "not said by the files" in out
    raw = json.loads((TINY / "2bits" / "config.json").read_text(encoding="utf-8"))
    order = raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]
    for option in (["--row-order"], ["--reference", str(TINY / "bf16")]):
        code, out, _ = inspect(capsys, monkeypatch, str(folder), "--json", *option)
        assert code == 0
        assert json.loads(out)["row_order_evidence"]["row_order"] == order


def test_a_damaged_model_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = silent(tmp_path)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    code, _, err = inspect(capsys, monkeypatch, str(folder), "--verify")
    assert code == 1
    assert "Traceback" not in err
    assert file.name in err


def test_what_is_no_model_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = inspect(capsys, monkeypatch, str(tmp_path))
    assert (code, "config.json" in err) == (1, True)
