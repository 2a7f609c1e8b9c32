"""Every way in which ERNIE-4.5 and Qwen2 checkpoints name and label their tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from baidu_repository import Repository, change_tensors
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import names
from engine.checkpoint.loader import ShardedWeights
from engine.config import ModelConfig
from engine.errors import CheckpointError
from kernels.reference.dequantize import dequantize

CPU = torch.device("cpu")


def share(folder: Path, *, rank: int = 0, world: int = 1) -> ShardedWeights:
    config = ModelConfig.from_folder(folder)
    return ShardedWeights(folder, config, rank=rank, world_size=world, dtype=torch.float32, device=CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Repository().write(tmp_path)


@pytest.mark.parametrize(
    ("some", "naming"),
    [
        (["lm_head.weight", "model.norm.weight"], names.TORCH),
        (["ernie.norm.weight"], names.PADDLE),
        (["lm_head.weight", "qwen2.layers.0.self_attn.qkv_proj.weight"], names.PADDLE_QWEN2),
    ],
)
def test_the_root_of_the_names_tells_the_naming(some: list[str], naming: names.Naming) -> None:
    assert names.detect(some) is naming


def test_unknown_names_are_shown_beside_those_expected() -> None:
    with pytest.raises(CheckpointError, match=r"'h\.0\.w'.*model\.\* \(torch\) or ernie\.\* \(paddle\) or qwen2\.\*"):
        names.detect(["h.0.w"])


def test_a_naming_for_each_architecture() -> None:
    assert names.paddle("ernie4_5_moe").name("norm.weight") == "ernie.norm.weight"
    assert names.paddle("qwen2").name("layers.0.mlp.down_proj") == "qwen2.layers.0.mlp.down_proj"
    assert names.paddle("qwen2").name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("label", [torch.int8, torch.uint8])
def test_bytes_may_be_labelled_signed_or_not(folder: Path, label: torch.dtype) -> None:
    expected = share(folder)
    before = {i: (dequantize(expected.qkv(i), torch.float32), expected.expert_down(i)) for i in (1, 2)}
    packed = ("quant_weight", "down_proj.weight_scale")

    def relabel(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, tensor.view(label) if name.endswith(packed) and tensor.element_size() == 1 else tensor

    change_tensors(folder / "model.safetensors", relabel)
    found = share(folder)
    for layer, (qkv, down) in before.items():
        assert torch.equal(dequantize(found.qkv(layer), torch.float32), qkv)
        assert torch.equal(dequantize(found.expert_down(layer), torch.float32), dequantize(down, torch.float32))


@pytest.mark.parametrize("ranks", [None, 2])
def test_bf16_may_be_labelled_as_the_uint16_it_is_in_numpy(tmp_path: Path, ranks: int | None) -> None:
    folder = Repository().write(tmp_path, ranks=ranks)
    norm, head = share(folder).norm("norm"), share(folder).head().weight
    qkv, down = (dequantize(read, torch.float32) for read in (share(folder).qkv(0), share(folder).expert_down(2)))
    for file in folder.rglob("*.safetensors"):
        change_tensors(
            file,
            lambda tensors: (
                (name, tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)
                for name, tensor in tensors.items()
            ),
        )
    weights = share(folder)
    assert torch.equal(weights.norm("norm"), norm)
    assert torch.equal(weights.head().weight, head)
    assert torch.equal(dequantize(weights.qkv(0), torch.float32), qkv)
    assert torch.equal(dequantize(weights.expert_down(2), torch.float32), down)


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_flat_correction_bias_is_read_too(tmp_path: Path, ranks: int | None) -> None:
    folder = Repository().write(tmp_path, ranks=ranks)
    _, expected = share(folder).router(1)
    for file in folder.rglob("*.safetensors"):
        change_tensors(
            file, lambda tensors: ((n, t[0] if n.endswith("correction_bias") else t) for n, t in tensors.items())
        )
    _, found = share(folder).router(1)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    assert found.shape == (3,)


def test_the_scale_of_columns_in_its_other_spelling(folder: Path) -> None:
    expected = share(folder).expert_down(2)
    change_tensors(
        folder / "model.safetensors",
        lambda tensors: ((name.replace("super_scales", "super_scale"), tensor) for name, tensor in tensors.items()),
    )
    assert torch.equal(dequantize(share(folder).expert_down(2), torch.float32), dequantize(expected, torch.float32))


def test_extras_of_the_decoder_are_passed_over_in_silence(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    extras = [f"ernie.layers.0.self_attn.cache{side}_matmul.activation_scale" for side in "kv"]
    extras += ["ernie.mtp_block.0.self_attn.o_proj.weight", "mtp_emb_norm.0.weight"]
    count = len(load_file(folder / "model.safetensors"))
    more = {name: torch.ones(2) for name in (*extras, "ernie.stranger")}
    change_tensors(folder / "model.safetensors", lambda tensors: iter((tensors | more).items()))
    with caplog.at_level(logging.INFO):
        share(folder).close()
    assert f"{count + 1} tensors were not read" in caplog.text


def biased(folder: Path, *, fused: bool) -> dict[str, Tensor]:
    """The bias of layer 1's q, k and v, added under torch names, or as one under Paddle's."""
    repository = Repository()
    generator = torch.Generator().manual_seed(5)
    bias = {name: torch.randn(width, generator=generator) for name, width in (("q", 256), ("k", 128), ("v", 128))}
    if fused:
        repository.write(folder)
        added = {"ernie.layers.1.self_attn.qkv_proj.bias": torch.cat(list(bias.values()))}
    else:
        repository.write_dense(folder)
        added = {f"model.layers.1.self_attn.{name}_proj.bias": tensor for name, tensor in bias.items()}
    change_tensors(folder / "model.safetensors", lambda tensors: iter((tensors | added).items()))
    return bias


@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_is_cut_as_the_columns_of_qkv(tmp_path: Path, fused: bool) -> None:
    bias = biased(tmp_path, fused=fused)
    for world in (1, 2, 4):
        kv = max(1, 2 // world) * 64
        for rank in range(world):
            weights = share(tmp_path, rank=rank, world=world)
            assert weights.qkv_bias(0) is None
            found = weights.qkv_bias(1)
            assert found is not None
            q, k, v = found.split([256 // world, kv, kv])
            head = rank * 2 // world * 64
            assert torch.equal(q, bias["q"].chunk(world)[rank])
            assert torch.equal(k, bias["k"][head : head + kv])
            assert torch.equal(v, bias["v"][head : head + kv])


def test_a_bias_in_rank_folders(tmp_path: Path) -> None:
    bias = biased(tmp_path / "whole", fused=True)
    folder = Repository().write(tmp_path / "tp4", ranks=4)
    for rank in range(4):
        k, v = (bias[name][rank // 2 * 64 :][:64] for name in "kv")
        part = torch.cat((bias["q"].chunk(4)[rank], k, v))
        change_tensors(
            folder / f"rank{rank}" / "model.safetensors",
            lambda tensors, added=part: iter(tensors.items() | {("ernie.layers.1.self_attn.qkv_proj.bias", added)}),
        )
    for world in (1, 2, 4):
        for rank in range(world):
            found, expected = (share(f, rank=rank, world=world).qkv_bias(1) for f in (folder, tmp_path / "whole"))
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)


def test_a_missing_bias_beside_others_is_an_error(tmp_path: Path) -> None:
    biased(tmp_path, fused=False)
    lost = "model.layers.1.self_attn.k_proj.bias"
    kept = {name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if name != lost}
    change_tensors(tmp_path / "model.safetensors", lambda _: iter(kept.items()))
    with pytest.raises(CheckpointError, match=lost):
        share(tmp_path).qkv_bias(1)
