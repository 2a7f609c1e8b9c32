"""Nothing of a WINT2 file is lost in reading: its bytes can be found again from the weights they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from baidu_repository import Matrix, Repository
from torch import Tensor

from engine.quantization import wint2
from engine.quantization.wint2 import pack_scales, stored_rows, unpack_scales

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
RowOrder = Literal["plain", "permuted"]


def windows(words: Tensor) -> Tensor:
    """The four 6-bit values of each word, stacked in a last dimension."""
    return torch.stack([((words >> shift) & 63) - 32 for shift in (9, 6, 3, 0)], dim=-1)


def encode(weights: Tensor, scales: Tensor, tensors: dict[str, Tensor], row_order: RowOrder) -> tuple[Tensor, Tensor]:
    """Bytes whose four windows are these weights [K, N], by trying all 256 of every column.

    Args:
        weights: bf16 [K, N], in logical order.
        scales: 1..15 [K/64, N].
        tensors: super_scales, code_scale and code_zp.
        row_order: in which to store.

    Returns:
        uint8 [K/4, N], the lowest byte where several mean the same; and how many do.
    """
    k, n = weights.shape
    rows = stored_rows(weights.float().T.reshape(n, k // 64, 64), row_order).reshape(n, k).T  # [K, N]
    step = scales.float().repeat_interleave(64, dim=0) * tensors["super_scales"].float()
    values = torch.round(rows / step).int().view(k // 4, 4, n)  # bf16 keeps the 64 values of a step apart
    byte = torch.arange(256.0).unsqueeze(1)
    codebook = windows(torch.floor(byte * tensors["code_scale"] + tensors["code_zp"] + 0.5).int())  # [256, N, 4]
    same = (values.transpose(1, 2).unsqueeze(1) == codebook).all(dim=-1)  # [K/4, 256, N]
    return same.to(torch.uint8).argmax(dim=1).to(torch.uint8), same.sum(dim=1)


def check(tensors: dict[str, Tensor], row_order: RowOrder) -> None:
    groups = tensors["quant_weight"].shape[0] // 16
    scales = unpack_scales(tensors["weight_scale"], groups)
    assert torch.equal(pack_scales(scales), tensors["weight_scale"])
    weights = wint2.dequantize(**tensors, row_order=row_order)
    found, choices = encode(weights, scales, tensors, row_order)
    stored = tensors["quant_weight"]
    known = scales.repeat_interleave(16, dim=0) > 0  # a group whose scale is 0 is all zeros, whatever its bytes
    assert (choices[known] >= 1).all()
    unique = known & (choices == 1)
    assert unique.float().mean() > 0.8
    assert torch.equal(found[unique], stored[unique])
    again = wint2.dequantize(**tensors | {"quant_weight": torch.where(known, found, stored)}, row_order=row_order)
    assert torch.equal(again, weights), "where two bytes of a codebook mean the same, either will do"


@pytest.mark.parametrize("row_order", ["plain", "permuted"])
@pytest.mark.parametrize("file", ["wint2_a", "wint2_b"])
def test_golden_bytes_are_found_again(file: str, row_order: RowOrder) -> None:
    data = np.load(GOLDEN / f"{file}.npz")
    names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    stack = {name: torch.from_numpy(data[name]) for name in names}
    stack["super_scales"] = stack["super_scales"].bfloat16()
    for matrix in range(len(stack["quant_weight"])):
        check({name: tensor[matrix] for name, tensor in stack.items()}, row_order)


@pytest.mark.parametrize("row_order", ["plain", "permuted"])
@pytest.mark.parametrize("rows", [64, 192, 256])
def test_random_bytes_are_found_again(rows: int, row_order: RowOrder) -> None:
    matrix: Matrix = Repository(row_order=row_order)._matrix("wint2", rows, 24)
    check(matrix.tensors(), row_order)
