"""The multi-token prediction module, wherever and however a repository keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from baidu_repository import Repository, change_tensors
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.checkpoint.mtp import read_mtp
from engine.config import ModelConfig
from engine.errors import CheckpointError

H = 128


def module(prefix: str = "", *, transposed: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    linear = random(H, 2 * H)
    return {
        f"{prefix}mtp_emb_norm.0.weight": random(H),
        f"{prefix}mtp_hidden_norm.0.weight": random(H),
        f"{prefix}mtp_linear_proj.0.weight": linear.T.contiguous() if transposed else linear,
        f"{prefix}mtp_block.0.input_layernorm.weight": random(H),
        f"{prefix}mtp_block.0.self_attn.o_proj.weight": random(256, H),
    }


def check(folder: Path) -> None:
    weights, expected = read_mtp(folder, ModelConfig.from_folder(folder)), module()
    assert weights is not None
    assert torch.equal(weights.embedding_norm, expected["mtp_emb_norm.0.weight"])
    assert torch.equal(weights.hidden_norm, expected["mtp_hidden_norm.0.weight"])
    assert torch.equal(weights.linear_proj, expected["mtp_linear_proj.0.weight"])
    assert weights.block == ("input_layernorm.weight", "self_attn.o_proj.weight")


def add(folder: Path, tensors: dict[str, Tensor]) -> None:
    for file in folder.rglob("model.safetensors"):
        change_tensors(file, lambda found: iter((found | tensors).items()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.", "ernie."])
def test_among_the_decoder_s_tensors(tmp_path: Path, prefix: str, transposed: bool) -> None:
    folder = Repository().write(tmp_path)
    add(folder, module(prefix, transposed=transposed))
    check(folder)
    weights = read_mtp(folder, ModelConfig.from_folder(folder))
    assert weights is not None
    assert weights.num_bytes == sum(tensor.numel() * 2 for tensor in module().values())


def test_in_rank_folders(tmp_path: Path) -> None:
    folder = Repository().write(tmp_path, ranks=2)
    add(folder, module("ernie."))
    check(folder)


@pytest.mark.parametrize("ranks", [None, 2])
def test_in_a_folder_of_its_own(tmp_path: Path, ranks: int | None) -> None:
    repository = Repository()
    folder = repository.write(tmp_path, ranks=ranks)
    (folder / "mtp").mkdir()
    save_file(module("ernie.", transposed=True), folder / "mtp" / "model.safetensors")
    check(folder)
    loaded = ShardedWeights(
        folder, repository.config.model_copy(update={"quantization": None}),
        rank=0, world_size=1, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    assert loaded.norm("norm").shape == (H,), "the decoder is not disturbed"


def test_a_repository_without_one(tmp_path: Path) -> None:
    assert read_mtp(Repository().write(tmp_path), Repository().config) is None


def test_a_module_with_a_part_missing(tmp_path: Path) -> None:
    folder = Repository().write(tmp_path)
    tensors = module()
    del tensors["mtp_hidden_norm.0.weight"]
    add(folder, tensors)
    with pytest.raises(CheckpointError, match=r"without 'mtp_hidden_norm\.0\.weight'; it has mtp_block"):
        read_mtp(folder, ModelConfig.from_folder(folder))


def test_a_projection_of_neither_shape(tmp_path: Path) -> None:
    folder = Repository().write(tmp_path)
    add(folder, module() | {"mtp_linear_proj.0.weight": torch.zeros(H, H)})
    with pytest.raises(CheckpointError, match=r"mtp_linear_proj\.0\.weight' is F32 \[128, 128\]; expected .*128, 256"):
        read_mtp(folder, ModelConfig.from_folder(folder))
