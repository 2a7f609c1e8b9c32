"""Every rank's share, put together, is the whole checkpoint: torch and Paddle names, bf16 and quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.compress.pipeline import quantize_folder, two_bit_plan
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from engine.quantization.config import QuantizationConfig
from kernels.operands import CcqWeight, Int4Weight, Int8Weight, Weight
from kernels.reference.dequantize import dequantize

Write = Callable[..., dict[str, Tensor]]
CPU = torch.device("cpu")


def share(folder: Path, config: ModelConfig, *, rank: int = 0, world: int = 1, **options: Any) -> ShardedWeights:
    return ShardedWeights(folder, config, rank=rank, world_size=world, dtype=torch.bfloat16, device=CPU, **options)


def dense(weight: Weight) -> Tensor:
    """[..., N, K]."""
    return dequantize(weight, torch.bfloat16)


def join_halves(parts: list[Tensor]) -> Tensor:
    """[gate_r | up_r] of every rank -> [gate | up]."""
    return torch.cat([half for i in (0, 1) for half in (part.chunk(2, dim=-2)[i] for part in parts)], dim=-2)


def join_heads(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """[q_r | k_r | v_r] of every rank -> [q | k | v]; replicated KV heads are taken once."""
    world, size = len(parts), config.head_dim
    kv_heads = max(1, config.num_key_value_heads // world)
    copies = max(1, world // config.num_key_value_heads)
    widths = [config.num_attention_heads // world * size, kv_heads * size, kv_heads * size]
    q, k, v = zip(*(part.split(widths) for part in parts), strict=True)
    for rank in range(world):
        assert torch.equal(k[rank], k[rank // copies * copies]), "replicas of a KV head are equal"
    return torch.cat([*q, *k[::copies], *v[::copies]])


def assemble(folder: Path, config: ModelConfig, world: int) -> dict[str, Tensor]:
    """All matrices and vectors of a checkpoint by our names, from the shares of ``world`` ranks."""
    ranks = [share(folder, config, rank=rank, world=world) for rank in range(world)]
    whole = {
        "embed_tokens": torch.cat([rank.embedding() for rank in ranks]),
        "lm_head": torch.cat([dense(rank.head()) for rank in ranks]),
        "norm": ranks[-1].norm("norm"),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        for norm in (f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"):
            whole[norm] = ranks[-1].norm(norm)
        whole[f"{prefix}.self_attn.qkv_proj"] = join_heads([dense(rank.qkv(layer)) for rank in ranks], config)
        whole[f"{prefix}.self_attn.o_proj"] = torch.cat([dense(r.attention_output(layer)) for r in ranks], dim=-1)
        if not config.is_moe_layer(layer):
            whole[f"{prefix}.mlp.up_gate_proj"] = join_halves([dense(rank.gate_up(layer)) for rank in ranks])
            whole[f"{prefix}.mlp.down_proj"] = torch.cat([dense(rank.down(layer)) for rank in ranks], dim=-1)
            continue
        gate, bias = ranks[-1].router(layer)
        assert bias is not None
        whole[f"{prefix}.mlp.gate"], whole[f"{prefix}.mlp.bias"] = gate, bias
        whole[f"{prefix}.mlp.shared_experts.up_gate_proj"] = join_halves(
            [dense(rank.gate_up(layer, shared=True)) for rank in ranks]
        )
        whole[f"{prefix}.mlp.shared_experts.down_proj"] = torch.cat(
            [dense(rank.down(layer, shared=True)) for rank in ranks], dim=-1
        )
        up_gate = join_halves([dense(rank.expert_gate_up(layer)) for rank in ranks])
        down = torch.cat([dense(rank.expert_down(layer)) for rank in ranks], dim=-1)
        for expert in range(len(up_gate)):
            whole[f"{prefix}.mlp.experts.{expert}.up_gate_proj"] = up_gate[expert]
            whole[f"{prefix}.mlp.experts.{expert}.down_proj"] = down[expert]
    for rank in ranks:
        rank.close()
    return whole


def expected_of_torch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names from the tensors of a ``-PT`` file."""
    flat = {name.removesuffix(".weight").removeprefix("model."): tensor for name, tensor in tensors.items()}
    whole: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        if name.endswith((".q_proj", ".gate_proj")):
            pieces = ("q_proj", "k_proj", "v_proj") if name.endswith(".q_proj") else ("gate_proj", "up_proj")
            prefix = name.removesuffix(pieces[0])
            fused = "qkv_proj" if name.endswith(".q_proj") else "up_gate_proj"
            whole[prefix + fused] = torch.cat([flat[prefix + piece] for piece in pieces])
        elif name.endswith("e_score_correction_bias"):
            whole[name.replace("moe_statics.e_score_correction_bias", "bias")] = tensor[0]
        elif not name.endswith((".k_proj", ".v_proj", ".up_proj")):
            whole[name] = tensor
    return whole


def expected_of_paddle(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same names from the tensors of a quantized Paddle file, every matrix dequantized as a whole."""
    quantization = QuantizationConfig.from_json(config.quantization)
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours, _, suffix = name.removeprefix("ernie.").rpartition(".")
        if suffix == "e_score_correction_bias":
            whole[ours.replace("moe_statics", "bias")] = tensor[0]
        elif suffix == "weight":
            linear = tensor.dim() == 2 and ours != "embed_tokens"
            whole[ours] = tensor.T if linear else tensor
        elif suffix == "quant_weight":
            layer = int(ours.split(".")[1])
            routed = ".experts." in ours
            weight_format = quantization.format("experts" if routed else "attention", layer)
            prefix = name.removesuffix(suffix)
            matrix = {other.removeprefix(prefix): t for other, t in tensors.items() if other.startswith(prefix)}
            whole[ours] = weight_format.dequantize(matrix).T
    return whole


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], vocab_size: int) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if name in ("embed_tokens", "lm_head"):
            assert not tensor[vocab_size:].any(), "padding is zero"
            assert torch.equal(tensor[:vocab_size], expected[name]), name
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Write) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module", params=["plain", "permuted"])
def quantized(request: pytest.FixtureRequest, bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / request.param
    quantize_folder(bf16, folder, plan=two_bit_plan(ModelConfig.from_folder(bf16), row_order=request.param))
    return folder


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_a_torch_checkpoint_are_the_whole(bf16: Path, world: int) -> None:
    config = ModelConfig.from_folder(bf16)
    expected = expected_of_torch(load_file(bf16 / "model.safetensors"))
    assert_same(assemble(bf16, config, world), expected, config.vocab_size)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_a_quantized_paddle_checkpoint_are_the_whole(quantized: Path, world: int) -> None:
    config = ModelConfig.from_folder(quantized)
    expected = expected_of_paddle(load_file(quantized / "model.safetensors"), config)
    assert_same(assemble(quantized, config, world), expected, config.vocab_size)


@pytest.mark.parametrize("world", [1, 2])
def test_shares_of_a_bf16_paddle_checkpoint_are_the_whole(bf16: Path, tmp_path: Path, world: int) -> None:
    config = ModelConfig.from_folder(bf16)
    expected = expected_of_torch(load_file(bf16 / "model.safetensors"))
    paddle = {}
    for name, tensor in expected.items():
        if name.endswith(".bias"):
            paddle[f"ernie.{name.replace('bias', 'moe_statics.e_score_correction_bias')}"] = tensor[None]
        else:
            stored = tensor.T.contiguous() if tensor.dim() == 2 and name != "embed_tokens" else tensor
            paddle[f"{'' if name == 'lm_head' else 'ernie.'}{name}.weight"] = stored
    save_file(paddle, tmp_path / "model.safetensors")
    assert_same(assemble(tmp_path, config, world), expected, config.vocab_size)


def test_a_tied_head_is_the_embedding(tmp_path: Path, write_checkpoint: Write) -> None:
    tensors = write_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = share(tmp_path, ModelConfig.from_folder(tmp_path), rank=1, world=2)
    table = weights.embedding()
    assert torch.equal(table[:50], tensors["model.embed_tokens.weight"][51:])
    assert table.shape == (51, 128)
    assert weights.head().weight.data_ptr() == table.data_ptr()


def test_quantized_weights_stay_packed(quantized: Path) -> None:
    config = ModelConfig.from_folder(quantized)
    weights = share(quantized, config, rank=1, world=4)
    assert isinstance(weights.qkv(0), Int8Weight)
    assert isinstance(weights.gate_up(1, shared=True), Int8Weight)
    assert isinstance(weights.expert_down(1), Int4Weight)
    down = weights.expert_down(2)
    assert isinstance(down, CcqWeight)
    assert down.codes.shape == (3, 16, 128)
    assert down.group_scales.shape == (3, 1, 128), "one group a rank, in the high nibble"
    assert down.row_order == quantized.name


def test_dtype_is_that_of_unquantized_weights(bf16: Path) -> None:
    config = ModelConfig.from_folder(bf16)
    weights = ShardedWeights(bf16, config, rank=0, world_size=1, dtype=torch.float32, device=CPU)
    assert dequantize(weights.expert_down(1), torch.float32).dtype == torch.float32
    assert weights.norm("norm").dtype == weights.embedding().dtype == torch.float32
    gate, bias = share(bf16, config).router(1)
    assert gate.dtype == torch.float32
    assert bias is not None
    assert bias.dtype == torch.float32


def test_a_router_without_a_bias(tmp_path: Path, write_checkpoint: Write) -> None:
    tensors = write_checkpoint(tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if "e_score_correction_bias" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    assert share(tmp_path, ModelConfig.from_folder(tmp_path)).router(1)[1] is None


def test_progress_counts_every_byte_once(bf16: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    config = ModelConfig.from_folder(bf16)
    weights = share(bf16, config, progress=lambda *call: calls.append(call))
    weights.embedding()
    weights.head()
    weights.norm("norm")
    for layer in range(config.num_hidden_layers):
        weights.norm(f"layers.{layer}.input_layernorm")
        weights.norm(f"layers.{layer}.post_attention_layernorm")
        weights.qkv(layer)
        weights.attention_output(layer)
        if config.is_moe_layer(layer):
            weights.router(layer)
            weights.gate_up(layer, shared=True)
            weights.down(layer, shared=True)
            weights.expert_gate_up(layer)
            weights.expert_down(layer)
        else:
            weights.gate_up(layer)
            weights.down(layer)
    total = sum(t.numel() * t.element_size() for t in load_file(bf16 / "model.safetensors").values())
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1][1:] == (total, total)
    assert "layers.2.mlp.experts.down_proj" in [call[0] for call in calls]


def changed_config(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> ModelConfig:
    """``source``'s config.json with a change; ``target`` gets its weights."""
    raw = json.loads((source / "config.json").read_text())
    change(raw)
    (target / "config.json").write_text(json.dumps(raw))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return ModelConfig.from_folder(target)


def test_the_row_order_is_asked_for_by_its_option(quantized: Path, tmp_path: Path) -> None:
    def forget(raw: dict[str, Any]) -> None:
        del raw["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]

    config = changed_config(quantized, tmp_path, forget)
    with pytest.raises(ConfigError, match=r'option row_order: "permuted".*"plain"'):
        share(tmp_path, config)
    down = share(tmp_path, config, row_order=quantized.name).expert_down(2)
    expected = share(quantized, ModelConfig.from_folder(quantized)).expert_down(2)
    assert torch.equal(dense(down), dense(expected))


def test_super_scale_is_another_name(quantized: Path, tmp_path: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    renamed = {name.replace("super_scales", "super_scale"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    config = ModelConfig.from_folder(quantized)
    found, expected = (share(folder, config).expert_gate_up(2) for folder in (tmp_path, quantized))
    assert torch.equal(dense(found), dense(expected))


@pytest.mark.parametrize(
    ("change", "world", "message"),
    [
        ({}, 3, "num_attention_heads 4 is not a multiple of it; sizes that work: 1, 2, 4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, "neither a multiple nor a divisor.*work: 1, 2"),
        ({"intermediate_size": 190}, 4, "intermediate_size 190 does not divide into 4 parts.*work: 1, 2"),
    ],
)
def test_a_size_that_does_not_fit_says_which_do(
    tmp_path: Path, write_checkpoint: Write, change: dict[str, Any], world: int, message: str
) -> None:
    write_checkpoint(tmp_path, **change)
    with pytest.raises(UnsupportedError, match=f"tensor_parallel_size {world} does not fit.*{message}"):
        share(tmp_path, ModelConfig.from_folder(tmp_path), world=world)


def test_wint2_rows_that_can_not_be_cut_say_which_sizes_work(quantized: Path, tmp_path: Path) -> None:
    config = changed_config(quantized, tmp_path, lambda raw: raw.update(moe_intermediate_size=128))
    message = "moe_intermediate_size 128 .* 4 parts that are multiples of 64 rows of wint2; sizes that work: 1, 2"
    with pytest.raises(UnsupportedError, match=message):
        share(tmp_path, config, world=4)


def test_a_matrix_of_wrong_shape_is_named(bf16: Path, tmp_path: Path) -> None:
    config = changed_config(bf16, tmp_path, lambda raw: raw.update(moe_intermediate_size=192))
    message = r"layers.1.mlp.experts.0.down_proj.weight' is BF16 \[128, 256\]; expected .* \[128, 192\]"
    with pytest.raises(CheckpointError, match=message):
        share(tmp_path, config).expert_down(1)


def test_a_matrix_of_wrong_dtype_is_named(quantized: Path, tmp_path: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    name = "ernie.layers.2.mlp.experts.1.down_proj.code_zp"
    tensors[name] = tensors[name].half()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}' is F16 \[128\]; expected F32 \[128\]"):
        share(tmp_path, ModelConfig.from_folder(quantized)).expert_down(2)


def test_a_matrix_in_another_format_than_the_config_says(quantized: Path, tmp_path: Path) -> None:
    config = changed_config(quantized, tmp_path, lambda raw: raw.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"is in format bf16, but the files have its quant_weight, weight_scale"):
        share(tmp_path, config).qkv(0)


def test_a_missing_head_hints_at_tying(tmp_path: Path, write_checkpoint: Write) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    config = ModelConfig.from_folder(tmp_path).model_copy(update={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*tie_word_embeddings"):
        share(tmp_path, config).head()


def test_quantization_under_torch_names_is_unsupported(bf16: Path, tmp_path: Path) -> None:
    config = changed_config(bf16, tmp_path, lambda raw: raw.update(quantization_config={"quantization": "wint8"}))
    with pytest.raises(UnsupportedError, match=r"\(wint8\) under torch names"):
        share(tmp_path, config)


def test_names_of_another_model_are_refused(bf16: Path, tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight.*expected model\.\* \(torch\) or ernie\.\*"):
        share(tmp_path, ModelConfig.from_folder(bf16))


@pytest.mark.parametrize("field", ["hidden_size", "moe_num_experts", "num_attention_heads"])
def test_a_config_without_a_needed_field_names_it(tmp_path: Path, write_checkpoint: Write, field: str) -> None:
    write_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw[field]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=rf"config\.json: missing field\(s\) {field}"):
        ModelConfig.from_folder(tmp_path)


def test_an_unknown_architecture_lists_the_supported(tmp_path: Path, write_checkpoint: Write) -> None:
    write_checkpoint(tmp_path, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM.*supported: .*Ernie4_5_MoeForCausalLM"):
        ModelConfig.from_folder(tmp_path)


def test_an_unknown_quantization_lists_the_supported(bf16: Path, tmp_path: Path) -> None:
    config = changed_config(bf16, tmp_path, lambda raw: raw.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(UnsupportedError, match=r"'awq' is not supported; supported: .*wint2"):
        share(tmp_path, config)
