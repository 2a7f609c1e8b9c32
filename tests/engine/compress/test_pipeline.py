"""A whole folder through the encoders, and what a reader of Baidu's checkpoints finds in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.compress.pipeline import quantize_folder, two_bit_plan
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, UnsupportedError

Write = Callable[..., dict[str, Tensor]]
SMALL = {"num_hidden_layers": 3, "moe_num_experts": 2, "moe_intermediate_size": 128, "moe_num_shared_experts": 0}


@pytest.fixture
def source(tmp_path: Path, write_checkpoint: Write) -> Path:
    folder = tmp_path / "bf16"
    write_checkpoint(folder, **SMALL)
    return folder


def test_tensors_have_baidus_names_shapes_and_dtypes(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "2bits"
    quantize_folder(source, target, plan=two_bit_plan(ModelConfig.from_folder(source)))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in load_file(target / "model.safetensors").items()}
    bf16, fp32, i8, u8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
    expected = {
        "ernie.embed_tokens.weight": (bf16, (101, 128)),
        "ernie.norm.weight": (bf16, (128,)),
        "lm_head.weight": (bf16, (128, 101)),
        "ernie.layers.0.mlp.up_gate_proj.quant_weight": (i8, (384, 128)),
        "ernie.layers.0.mlp.up_gate_proj.weight_scale": (bf16, (384,)),
        "ernie.layers.0.mlp.down_proj.quant_weight": (i8, (128, 192)),
        "ernie.layers.0.mlp.down_proj.weight_scale": (bf16, (128,)),
    }
    for layer in range(3):
        expected |= {
            f"ernie.layers.{layer}.input_layernorm.weight": (bf16, (128,)),
            f"ernie.layers.{layer}.post_attention_layernorm.weight": (bf16, (128,)),
            f"ernie.layers.{layer}.self_attn.qkv_proj.quant_weight": (i8, (256, 128)),
            f"ernie.layers.{layer}.self_attn.qkv_proj.weight_scale": (bf16, (256,)),
            f"ernie.layers.{layer}.self_attn.o_proj.quant_weight": (i8, (128, 128)),
            f"ernie.layers.{layer}.self_attn.o_proj.weight_scale": (bf16, (128,)),
        }
    for layer in (1, 2):
        expected |= {
            f"ernie.layers.{layer}.mlp.gate.weight": (fp32, (128, 2)),
            f"ernie.layers.{layer}.mlp.moe_statics.e_score_correction_bias": (fp32, (1, 2)),
        }
        for expert in range(2):
            for projection, n in (("up_gate_proj", 256), ("down_proj", 128)):
                prefix = f"ernie.layers.{layer}.mlp.experts.{expert}.{projection}"
                if layer == 1:
                    expected |= {f"{prefix}.quant_weight": (i8, (n // 2, 128)), f"{prefix}.weight_scale": (bf16, (n,))}
                else:
                    expected |= {
                        f"{prefix}.quant_weight": (u8, (32, n)),
                        f"{prefix}.weight_scale": (u8, (1, n)),
                        f"{prefix}.super_scales": (bf16, (n,)),
                        f"{prefix}.code_scale": (fp32, (n,)),
                        f"{prefix}.code_zp": (fp32, (n,)),
                    }
    assert found == expected


def test_config_and_tokenizer_go_along(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    (source / "notes.txt").write_text("stays")
    target = tmp_path / "2bits"
    quantize_folder(source, target, plan=two_bit_plan(ModelConfig.from_folder(source)))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert after.pop("is_quantized") is True
    parts = after.pop("quantization_config")["moe_quant_config"]
    assert after == before
    layers = [(part["quant_type"], part["quant_start_layer"], part["quant_end_layer"]) for part in parts.values()]
    assert layers == [("wint4", 0, 1), ("wint2", 2, 2)]
    assert sorted(file.name for file in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_report_and_progress_cover_every_matrix(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    plan = two_bit_plan(ModelConfig.from_folder(source))
    report = quantize_folder(source, tmp_path / "2bits", plan=plan, progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == sum(group.num_weights for group in report.groups.values())
    assert len(calls) == 3 * 2 + 2 + 2 * 4
    errors = {(group.group, group.format): group.relative_error for group in report.groups.values()}
    assert errors["attention", "wint8"] < 1e-4
    assert errors["dense MLP", "wint8"] < 1e-4
    assert errors["routed experts", "wint4"] < 0.02
    assert errors["routed experts", "wint2"] < 0.12
    stored = load_file(tmp_path / "2bits" / "model.safetensors").values()
    assert report.num_bytes == sum(t.numel() * t.element_size() for t in stored)


def test_a_tied_model_gets_no_head(tmp_path: Path, write_checkpoint: Write) -> None:
    write_checkpoint(tmp_path / "bf16", **SMALL, tie_word_embeddings=True)
    plan = two_bit_plan(ModelConfig.from_folder(tmp_path / "bf16"))
    quantize_folder(tmp_path / "bf16", tmp_path / "2bits", plan=plan)
    assert "lm_head.weight" not in load_file(tmp_path / "2bits" / "model.safetensors")


def test_a_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    plan = two_bit_plan(ModelConfig.from_folder(source))
    quantize_folder(source, tmp_path / "2bits", plan=plan)
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize_folder(tmp_path / "2bits", tmp_path / "again", plan=plan)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.1\.up_gate_proj holds values that are not"):
        quantize_folder(source, tmp_path / "2bits", plan=two_bit_plan(ModelConfig.from_folder(source)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


@pytest.mark.parametrize("layers", [0, 2])
def test_a_plan_needs_layers_of_both_kinds(source: Path, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"{layers} WINT4 layers in a model with 2 MoE layers; expected 1 to 1"):
        two_bit_plan(ModelConfig.from_folder(source), wint4_layers=layers)
