"""The row order of WINT2 weights is found by evidence, and not guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams, row_order
from engine.config import ModelConfig
from engine.errors import ConfigError

TINY = Path(__file__).resolve().parents[2] / "examples" / "ernie-tiny"
CPU = torch.device("cpu")


def config_without_order(folder: Path) -> ModelConfig:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"].pop("row_order")
    return ModelConfig.from_json(raw)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's 2-bit model with a config.json that does not say the row order, as Baidu's."""
    folder = tmp_path_factory.mktemp("silent") / "2bits"
    shutil.copytree(TINY / "2bits", folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"].pop("row_order")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def stored_order() -> str:
    raw = json.loads((TINY / "2bits" / "config.json").read_text(encoding="utf-8"))
    order = raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]
    assert order in ("plain", "permuted")
    return order


def test_an_unquantized_expert_tells(silent: Path) -> None:
    verdict = row_order.by_expert(silent, ModelConfig.from_folder(silent), TINY / "bf16")
    assert verdict.row_order == stored_order()
    assert "correlation" in verdict.explanation


def test_a_text_tells(silent: Path) -> None:
    verdict = row_order.by_text(silent, ModelConfig.from_folder(silent), device=CPU, dtype=torch.float32)
    assert verdict.row_order == stored_order(), verdict.explanation
    assert "standard errors" in verdict.explanation


def test_an_expert_of_another_model_decides_nothing(silent: Path, tmp_path: Path) -> None:
    """Same shapes, other weights: neither order correlates."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(TINY / "bf16", other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: tensor[torch.randperm(len(tensor), generator=generator)] if "experts" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(shuffled, other / "model.safetensors")
    config = ModelConfig.from_folder(silent)
    verdict = row_order.by_expert(silent, config, other)
    assert verdict.row_order is None
    with pytest.raises(ConfigError, match=r"not clear: correlation.*row_order"):
        row_order.resolve(silent, config, reference=other, device=CPU, dtype=torch.float32)


def test_a_quantized_reference_is_refused(silent: Path) -> None:
    with pytest.raises(ConfigError, match="quantized itself"):
        row_order.by_expert(silent, ModelConfig.from_folder(silent), TINY / "2bits")


@pytest.mark.parametrize(
    ("plain", "permuted", "expected"),
    [
        ([2.0, 3.0, 4.0] * 40, [8.0, 9.0, 9.5] * 40, "plain"),
        ([8.0, 9.0, 9.5] * 40, [2.0, 3.0, 4.0] * 40, "permuted"),
        ([5.0, 6.0, 7.0] * 40, [5.0, 6.0, 7.0] * 40, None),
        ([5.0] * 100_000, [5.0, 5.1] * 50_000, None),  # significant, and yet a trifle
        ([1.0, 9.0, 4.0], [9.0, 1.0, 9.0], None),  # large, and yet chance
        ([float("nan")] * 9, [5.0] * 9, None),
    ],
)
def test_weak_evidence_decides_nothing(plain: list[float], permuted: list[float], expected: str | None) -> None:
    verdict = row_order.by_losses(torch.tensor(plain).double(), torch.tensor(permuted).double())
    assert verdict.row_order == expected, verdict.explanation


def test_serving_finds_it_out(silent: Path) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(TINY / "2bits", num_threads=1, max_model_len=64) as said:
        expected = said.generate(["import os"], greedy)[0].outputs[0].text
    with LLM(silent, num_threads=1, max_model_len=64) as found:
        assert found.generate(["import os"], greedy)[0].outputs[0].text == expected
