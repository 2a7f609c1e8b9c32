"""What a checkpoint holds is counted right, and what is wrong with it is found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from baidu_repository import Repository, change_tensors
from torch import Tensor

from engine.checkpoint.inventory import Inventory, take_inventory, verify
from engine.config import ModelConfig

FILE = "model.safetensors"


def inventory(folder: Path) -> Inventory:
    return take_inventory(folder, ModelConfig.from_folder(folder))


def problems(folder: Path) -> list[str]:
    return list(verify(folder, ModelConfig.from_folder(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Repository().write(tmp_path / "model")


def test_formats_by_layer_and_their_bits(folder: Path) -> None:
    found = inventory(folder)
    assert [(use.part, use.format, use.first, use.last) for use in found.formats] == [
        ("attention", "wint8", 0, 2),
        ("mlp", "wint8", 0, 0),
        ("shared_experts", "wint8", 1, 2),
        ("experts", "wint4", 1, 1),
        ("experts", "wint2 (row_order permuted)", 2, 2),
    ]
    bits = {use.format.split()[0]: use.bits_per_weight for use in found.formats if use.part == "experts"}
    weights = 3 * (128 * 512 + 256 * 128)
    assert bits["wint4"] == pytest.approx(4 + 16 * 3 * (512 + 128) / weights)  # a bf16 scale a column
    assert bits["wint2"] == pytest.approx(2 + 4 / 64 + 80 * 3 * (512 + 128) / weights)  # and 10 bytes a column
    assert found.row_order == "permuted"


def test_bytes_add_up_to_the_files(tmp_path: Path) -> None:
    for ranks in (None, 2):
        folder = Repository().write(tmp_path / str(ranks), ranks=ranks)
        found = inventory(folder)
        assert len(found.bytes_by_rank) == (ranks or 1)
        assert sum(found.bytes_by_part.values()) == found.num_bytes == sum(found.bytes_by_rank)
        on_disk = sum(file.stat().st_size for file in folder.rglob(FILE))
        assert 0 < on_disk - found.num_bytes < 0.2 * on_disk, "headers only"


def test_a_sound_checkpoint_has_no_problems(tmp_path: Path) -> None:
    for ranks in (None, 2, 4):
        assert problems(Repository().write(tmp_path / str(ranks), ranks=ranks)) == []


def nan_at(name: str, value: float):
    def change(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in tensors.items():
            if stored.endswith(name):
                tensor = tensor.clone()  # noqa: PLW2901 - the changed copy is what is yielded
                tensor.view(-1)[3] = value
            yield stored, tensor

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "layers.2.mlp.experts.1.down_proj.super_scales",
            float("nan"),
            r"down_proj: super_scales holds 1 values",
        ),
        ("layers.2.mlp.experts.1.down_proj.super_scales", -1.0, r"super_scales holds 1 negative scales"),
        ("layers.0.self_attn.o_proj.weight_scale", float("inf"), r"self_attn\.o_proj: scale holds 1 values"),
        ("layers.1.input_layernorm.weight", float("nan"), r"layers\.1\.input_layernorm"),
    ],
)
def test_bad_values_are_found(folder: Path, name: str, value: float, message: str) -> None:
    change_tensors(folder / FILE, nan_at(name, value))
    (problem,) = problems(folder)
    assert re.search(message, problem), problem


def test_every_bad_tensor_is_named_and_not_only_the_first(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in tensors.items():
            if stored.endswith("layers.0.self_attn.o_proj.quant_weight"):
                continue
            yield stored, tensor[:-1] if stored.endswith("layers.2.post_attention_layernorm.weight") else tensor

    change_tensors(folder / FILE, change)
    found = problems(folder)
    assert len(found) == 2
    assert "o_proj.quant_weight" in found[0]
    assert "expected BF16" in found[1]
    assert "[127]" in found[1]


def test_an_unquantized_checkpoint(tmp_path: Path) -> None:
    found = inventory(Repository().write_dense(tmp_path / "dense"))
    assert {use.format for use in found.formats} == {"bf16"}
    assert found.row_order is None
    assert all(use.bits_per_weight == 32 for use in found.formats), "as stored: this one is fp32"
    assert torch.tensor(list(found.bytes_by_part.values())).min() > 0
