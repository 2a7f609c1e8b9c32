"""Operands side by side as one, to the bit: shares of a matrix that was cut for more ranks than now serve it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.quantization.wint2 import GROUP_ROWS, WORD_ROWS, pack_scales, unpack_scales
from kernels.operands import (
    BitplaneWeight,
    CcqWeight,
    DenseWeight,
    GroupedWeight,
    Int4Weight,
    Int8Weight,
    SplitWeight,
    Weight,
)

_W = TypeVar("_W", bound=Weight)

# (axis of N, axis of K) of every tensor of an operand (kernels.operands); an axis of None: one value for all of K.
_AXES: dict[type[Weight], dict[str, tuple[int, int | None]]] = {
    DenseWeight: {"weight": (-2, -1)},
    Int8Weight: {"values": (-2, -1), "scale": (-1, None)},
    Int4Weight: {"packed": (-2, -1), "scale": (-1, None)},
    CcqWeight: {
        "codes": (-1, -2),
        "group_scales": (-1, -2),
        "super_scales": (-1, None),
        "code_scale": (-1, None),
        "code_zp": (-1, None),
    },
    BitplaneWeight: {"planes": (-1, -3), "coefficients": (-1, -3)},
    GroupedWeight: {"codes": (-1, -2), "zeros": (-1, -2), "scales": (-1, -2)},
}


def join_columns(parts: Sequence[Weight]) -> Weight:
    """Parts of one type side by side along N, in their order."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {
        name: torch.cat(_field(parts, name), dim=n) for name, (n, _) in _AXES[type(parts[0])].items()
    }
    return dataclasses.replace(parts[0], **joined)


def join_rows(parts: Sequence[Weight], *, split: bool = False) -> Weight:
    """Parts of one type side by side along K, in their order.

    Where their per-column scales differ (each part was quantized on its own), or with ``split``, they stay apart in
    a ``SplitWeight``.
    """
    if len(parts) == 1:
        return parts[0]
    axes = _AXES[type(parts[0])]
    columns = {name: _field(parts, name) for name, (_, k) in axes.items() if k is None}
    if split or not all(torch.equal(first, other) for first, *others in columns.values() for other in others):
        return SplitWeight(tuple(parts))
    joined: dict[str, Any] = {
        name: torch.cat(_field(parts, name), dim=k) for name, (_, k) in axes.items() if k is not None
    }
    if isinstance(parts[0], CcqWeight):
        joined["group_scales"] = _join_group_scales(parts)
    return dataclasses.replace(parts[0], **joined)


def tensors(weight: Weight) -> Iterator[Tensor]:
    """All tensors of an operand."""
    if isinstance(weight, SplitWeight):
        for part in weight.parts:
            yield from tensors(part)
        return
    for _, tensor in _named(weight):
        yield tensor


def map_tensors(weight: _W, change: Callable[[Tensor], Tensor]) -> _W:
    """The operand with every tensor replaced by ``change`` of it."""
    changed: dict[str, Any]
    if isinstance(weight, SplitWeight):
        changed = {"parts": tuple(map_tensors(part, change) for part in weight.parts)}
    else:
        changed = {name: change(tensor) for name, tensor in _named(weight)}
    return dataclasses.replace(weight, **changed)


def _named(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    for name in _AXES[type(weight)]:
        yield name, getattr(weight, name)


def _field(parts: Sequence[Weight], name: str) -> list[Tensor]:
    return [getattr(part, name) for part in parts]


def _join_group_scales(parts: Sequence[Weight]) -> Tensor:
    """Two scales share a byte, so a part with an odd number of groups shifts those after it by half a byte."""
    scales = [
        unpack_scales(part.group_scales, part.codes.shape[-2] * WORD_ROWS // GROUP_ROWS)
        for part in parts
        if isinstance(part, CcqWeight)
    ]
    return pack_scales(torch.cat(scales, dim=-2))
