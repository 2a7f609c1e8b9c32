"""Weights made ready for a GPU, and the product of activations with one matrix."""

from __future__ import annotations

import functools
import logging
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.gpu import launch, pack
from kernels.gpu.arrange import finish_kernel
from kernels.gpu.packed import GpuPrepared, Packed
from kernels.gpu.shapes import shape_for
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
from kernels.prepared import DensePrepared, Prepared
from kernels.reference.dequantize import dequantize

logger = logging.getLogger(__name__)
FINISH_BLOCK = 1024


def prepare(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Re-lay packed weights (`kernels.gpu.packed`); a dense matrix stays as it is, for cuBLAS.

    What has no layout here (input features that fill no tile, groups of odd sizes) is decoded to `dtype`, and a warning
    says so.
    """
    if isinstance(weight, SplitWeight):
        parts = [prepare(part, dtype=dtype, device=device) for part in weight.parts]
        if all(isinstance(part, DensePrepared) for part in parts):
            return DensePrepared.of(torch.cat([p.weight for p in parts if isinstance(p, DensePrepared)], dim=-1))
        return GpuPrepared(tuple(piece for part in parts for piece in pieces(part)), dtype)
    # fp32 is for comparisons: on a GPU its products would not be exact, and the interpreter has nothing to save.
    whole = isinstance(weight, DenseWeight) or (dtype == torch.float32 and device.type != "cpu")
    packed = None if whole else _pack(weight, device)
    if packed is not None:
        return GpuPrepared((packed,), dtype)
    decoded = DensePrepared.of(dequantize(weight, dtype).to(device).contiguous())
    if not isinstance(weight, DenseWeight):
        _warn(type(weight).__name__, decoded.in_features, dtype)
    return decoded


@functools.cache
def _warn(operand: str, in_features: int, dtype: torch.dtype) -> None:
    """Once for each kind of weight."""
    logger.warning(
        "no packed kernel for %s with %d input features: decoded to %s, which takes more memory and time",
        operand,
        in_features,
        dtype,
    )


def _pack(weight: Weight, device: torch.device) -> Packed | None:
    moved = _to(weight, device)
    if isinstance(moved, Int8Weight):
        return pack.int8(moved)
    if isinstance(moved, Int4Weight):
        return pack.int4(moved)
    if isinstance(moved, CcqWeight):
        return pack.ccq(moved)
    if isinstance(moved, BitplaneWeight):
        return pack.planes(moved)
    if isinstance(moved, GroupedWeight):
        return pack.grouped(moved)
    return None


def _to(weight: Weight, device: torch.device) -> Weight:
    """The same operand with its tensors on `device`."""
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})


def pieces(weight: Prepared) -> tuple[Packed, ...]:
    """Parts along K of what `prepare` made. Raises TypeError for another backend's."""
    if isinstance(weight, GpuPrepared):
        return weight.parts
    if isinstance(weight, DensePrepared):
        return (Packed("dense", pack.stacked(weight.weight, dims=2), weight.in_features),)
    raise TypeError(f"{type(weight).__name__} was prepared for another device; see kernels.ops.prepare")


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """[T, K] -> [T, N]; see `kernels.ops.linear`."""
    if isinstance(weight, DensePrepared):
        return F.linear(x, weight.weight, bias)
    packed = GpuPrepared(pieces(weight))
    tokens, features = x.shape[0], weight.out_features
    if not tokens:
        return x.new_empty((0, features))
    sums = launch.multiply(x, packed, rows=tokens, shape=shape_for(tokens, packed), bias=bias)
    if len(sums) == 1:
        return sums[0]
    out = x.new_empty((tokens, features))
    finish_kernel[(tokens, triton.cdiv(features, FINISH_BLOCK))](
        sums,
        sums if bias is None else bias,
        out,
        tokens,
        features,
        len(sums),
        BIAS=bias is not None,
        BLOCK=FINISH_BLOCK,
        enable_fp_fusion=True,
    )
    return out
