"""A whole folder through the encoders, and what a reader of Baidu's checkpoints finds in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_batches import all_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.checkpoint.loader import ShardedWeights
from engine.compress.ccq import CcqOptions
from engine.compress.encode import EncodeOptions
from engine.compress.pipeline import Calibration, quantize_folder
from engine.compress.plan import Recipe, read_plan, two_bit_plan
from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.execution.executor import Executor
from engine.quantization.bitplane import Bitplane
from engine.quantization.config import QuantizationConfig
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq
from engine.quantization.wint2 import Wint2
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8

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
    assert len({what for what, _, _ in calls if ":" not in what}) == 3 * 2 + 2 + 2 * 4  # the others are steps
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


def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    plan = two_bit_plan(ModelConfig.from_folder(source))
    for layer, left in ((0, ["bf16"]), (2, [".2bits.quantize", "bf16"])):
        name = "self_attn.o_proj" if layer == 0 else "mlp.experts.1.up_proj"
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        broken[f"model.layers.{layer}.{name}.weight"][0, 0] = float("nan")
        save_file(broken, source / "model.safetensors")
        module = name.replace("up_proj", "up_gate_proj").replace(".", r"\.")
        with pytest.raises(CheckpointError, match=rf"layers\.{layer}\.{module} holds values that are not"):
            quantize_folder(source, tmp_path / "2bits", plan=plan)
        assert sorted(path.name for path in tmp_path.iterdir()) == left  # finished layers are kept


@pytest.mark.parametrize(("layers", "formats"), [(0, ["wint2"]), (1, ["wint4", "wint2"])])
def test_the_first_expert_layers_keep_four_bits(source: Path, layers: int, formats: list[str]) -> None:
    plan = two_bit_plan(ModelConfig.from_folder(source), wint4_layers=layers)
    assert [rule.format.name for rule in plan.rules if rule.part == "experts"] == formats
    assert QuantizationConfig.from_json(plan.to_json()).format("experts", 2) == Wint2("plain")


def test_a_plan_needs_a_layer_of_its_own_format(source: Path) -> None:
    with pytest.raises(ConfigError, match="2 WINT4 layers in a model with 2 MoE layers; expected 0 to 1"):
        two_bit_plan(ModelConfig.from_folder(source), wint4_layers=2)


@pytest.mark.parametrize(
    ("recipe", "experts"),
    [
        (Recipe(method="bpdq", bits=3, group_size=32), Bitplane(3, 32)),
        (Recipe(method="bpdq", bits=4, nested=True), Bitplane(4, 64, nested=True)),
        (Recipe(method="gptq", bits=4, group_size=128), Gptq(4, 128)),
        (Recipe(method="rtn", bits=8), Wint8()),
        (Recipe(method="rtn", bits=4), Wint4()),
        (Recipe(method="rtn", bits=2), Gptq(2, 64)),
    ],
)
def test_a_method_is_for_routed_experts_or_for_everything(
    source: Path, write_checkpoint: Write, recipe: Recipe, experts: WeightFormat
) -> None:
    plan = recipe.plan(ModelConfig.from_folder(source))
    assert (plan.format("attention", 2), plan.format("mlp", 0)) == (Wint8(), Wint8())
    assert (plan.format("experts", 1), plan.format("experts", 2)) == (Wint4(), experts)
    write_checkpoint(source, **SMALL | {"num_hidden_layers": 2, "architectures": ["Ernie4_5ForCausalLM"]})
    dense = recipe.plan(ModelConfig.from_folder(source))
    assert {dense.format(part, 0) for part in ("attention", "mlp")} == {experts}
    assert QuantizationConfig.from_json(dense.to_json()).format("mlp", 1) == experts


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"method": "ccq", "bits": 3}, "ccq has no format of 3 bits; it has 2"),
        ({"method": "gptq", "bits": 3}, "it has 2, 4, 8"),
        ({"method": "awq"}, "expected one of ccq, bpdq, gptq, rtn"),
        ({"nested": True}, "nested is for bpdq with 4 bits"),
        ({"dense": "fp8"}, "expected one of wint8, wint4, bf16"),
    ],
)
def test_what_a_recipe_can_not_be(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Recipe(**wrong)


def test_a_matrix_that_does_not_fit_its_format_is_named_before_anything_is_done(
    tmp_path: Path, write_checkpoint: Write
) -> None:
    write_checkpoint(tmp_path / "bf16", **SMALL | {"moe_intermediate_size": 96})
    plan = two_bit_plan(ModelConfig.from_folder(tmp_path / "bf16"))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.experts\.0\.down_proj \(routed experts\): .* 64"):
        quantize_folder(tmp_path / "bf16", tmp_path / "2bits", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_an_output_that_exists_is_replaced_only_on_demand(source: Path, tmp_path: Path) -> None:
    target, plan = tmp_path / "out", Recipe(method="rtn", bits=8).plan(ModelConfig.from_folder(source))
    quantize_folder(source, target, plan=plan)
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        quantize_folder(source, target, plan=plan)
    assert (target / "mine").exists()
    quantize_folder(source, target, plan=plan, overwrite=True)
    assert not (target / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out"]


def test_a_plan_file_mixes_formats_by_layer(source: Path, tmp_path: Path) -> None:
    rules = [
        {"part": "attention", "format": "bf16", "last_layer": 0},
        {"part": "attention", "format": "gptq", "bits": 4, "group_size": 32},
        {"part": "mlp", "format": "wint4"},
        {"part": "experts", "format": "bitplane", "planes": 2, "group_size": 64, "last_layer": 1},
        {"part": "experts", "format": "wint2"},
    ]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"quantization": "dibit", "rules": rules}))
    report = quantize_folder(source, tmp_path / "out", plan=read_plan(file), calibration=Calibration(tokens(4)))
    assert set(report.groups) == {
        ("attention", "bf16"), ("attention", "gptq"), ("dense MLP", "wint4"), ("routed experts", "bitplane"),
        ("routed experts", "wint2"),
    }  # fmt: skip
    assert report.groups["attention", "bf16"].relative_error == 0
    written = ModelConfig.from_folder(tmp_path / "out")
    ShardedWeights(
        tmp_path / "out", written, rank=0, world_size=1, dtype=torch.float32, device=torch.device("cpu")
    ).expert_down(2)
    for wrong, why in (("[]", "expected"), ("{", "not valid JSON"), ('{"quantization": "awq"}', "awq")):
        file.write_text(wrong)
        with pytest.raises((ConfigError, UnsupportedError), match=why):
            read_plan(file)


PLAIN = CcqOptions(feedback=False, metric=False, running_scales=False, heavy_first=False, beams=1, sweeps=0)


def test_error_feedback_lowers_the_error_of_outputs(source: Path, tmp_path: Path) -> None:
    plan = Recipe(method="ccq", bits=2).plan(ModelConfig.from_folder(source))
    calibration = Calibration(tokens(16))
    errors = [
        quantize_folder(source, tmp_path / name, plan=plan, calibration=calibration, encoding=options).groups
        for name, options in (("without", EncodeOptions(effort=PLAIN)), ("with", EncodeOptions()))
    ]
    key = ("routed experts", "wint2")
    assert errors[1][key].relative_output_error < 0.9 * errors[0][key].relative_output_error
    assert errors[1][key].relative_error > errors[0][key].relative_error


@pytest.mark.parametrize("recipe", [Recipe(method="gptq", bits=8, group_size=32), Recipe(method="rtn", bits=8)])
def test_a_model_with_biases_keeps_them(tmp_path: Path, recipe: Recipe) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=101, num_hidden_layers=2, initializer_range=0.2, **sizes)
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    plan = recipe.plan(ModelConfig.from_folder(tmp_path / "bf16"))
    calibration = Calibration(tokens(16)) if recipe.method == "gptq" else None
    quantize_folder(tmp_path / "bf16", tmp_path / "out", plan=plan, calibration=calibration)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert names["qwen2.layers.1.self_attn.qkv_proj.bias"].shape == (128,)
    found = []
    for folder in (tmp_path / "bf16", tmp_path / "out"):
        options = EngineConfig(model=str(folder), device="cpu", max_model_len=64, num_threads=1)
        executor = Executor.start_local(options, ModelConfig.from_folder(folder))
        found.append(all_logits(executor, tokens(1)[0].tolist()))
        executor.shutdown()
    assert found[0].abs().max() > 0.5, "logits near zero compare nothing"
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.05


def test_starved_experts_are_named(source: Path, tmp_path: Path) -> None:
    plan = Recipe(method="gptq").plan(ModelConfig.from_folder(source))
    report = quantize_folder(source, tmp_path / "out", plan=plan, calibration=Calibration(tokens(2)))
    assert len(report.warnings) == 2
    assert report.warnings[0].startswith("layer 1: 2 experts saw fewer than 128 calibration tokens: ")
    trusting = Calibration(tokens(2), trusted_tokens=0)
    report = quantize_folder(source, tmp_path / "out", plan=plan, calibration=trusting, overwrite=True)
    assert report.warnings == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.zeros(2, 65, dtype=torch.int64), "max_position_embeddings 64"),
        (torch.full((2, 8), 101), "ids from 101 to 101; the model has 101"),
        (torch.zeros(0, 8, dtype=torch.int64), r"tokens \[0, 8\]"),
    ],
)
def test_tokens_that_the_model_can_not_read(source: Path, tmp_path: Path, wrong: Tensor, why: str) -> None:
    plan = two_bit_plan(ModelConfig.from_folder(source))
    with pytest.raises(ConfigError, match=why):
        quantize_folder(source, tmp_path / "out", plan=plan, calibration=Calibration(wrong))


def tokens(sequences: int) -> Tensor:
    return torch.randint(0, 101, (sequences, 32), generator=torch.Generator().manual_seed(sequences))
