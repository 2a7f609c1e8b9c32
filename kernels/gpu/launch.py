"""The launches of products: all follows from sizes known without the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from kernels.gpu.arrange import arrange_kernel
from kernels.gpu.grouped import grouped_kernel
from kernels.gpu.multiply import multiply_kernel
from kernels.gpu.packed import GpuPrepared, Packed
from kernels.gpu.shapes import (
    SHARED_BYTES,
    Shape,
    columns_for,
    features_for,
    group_tiles,
    splits_for,
    stages_for,
    takes_groups,
)

ARRANGE_BLOCK = 4096
"""Activations of a row that a program brings in order at a time."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of activations that meet packed weights: fp16 for 16-bit activations; fp32 for the interpreter's tests."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def arrange(x: Tensor, weight: Packed, *, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A row for the kernel that multiplies.

    Args:
        x: [T, K] of row stride any, features contiguous.
        weight: not dense.
        grouped: for `grouped_kernel`.

    Returns:
        arranged [T, whole tiles], unit fp32 [T], and if `grouped` sums fp32 [T, tiles, groups], else unit again.
    """
    tokens, k = x.shape
    padded = weight.tiles * weight.tile
    out = torch.empty((tokens, padded), dtype=compute_dtype(x.dtype), device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = unit.new_empty((tokens, weight.tiles, weight.groups)) if grouped else unit
    arrange_kernel[(tokens,)](
        x,
        unit if weight.order is None else weight.order,
        out,
        unit,
        sums,
        k,
        padded,
        x.stride(0),
        TILE=weight.tile,
        GROUPS=weight.groups,
        RUN=weight.run,
        PERMUTE=weight.order is not None,
        SHIFT=grouped or weight.layout == "ccq",
        SUMS=grouped,
        BLOCK=min(triton.next_power_of_2(padded), ARRANGE_BLOCK),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out, unit, sums


def multiply(
    x: Tensor,
    weight: GpuPrepared,
    *,
    rows: int,
    shape: Shape,
    share: int = 1,
    blocks: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x W^T``, perhaps in parts that remain to be summed.

    Args:
        x: [rows / share, K].
        weight: one matrix, or experts with `blocks`.
        rows: of the result.
        shape: of the programs.
        share: slots that share a row of x.
        blocks: slots and owners of `kernels.gpu.routing.sort_pairs`, for experts.
        bias: [N], added if the result is not in parts.

    Returns:
        [splits, rows, N]: fp32, or the dtype of x if splits is 1, and then the bias is in it.
    """
    count = triton.cdiv(rows, shape.rows) if blocks is None else blocks[1].numel()
    splits = [splits_for(part, blocks=count, shape=shape) for part in weight.parts]
    whole = sum(splits) == 1
    out = torch.empty(
        (sum(splits), rows, weight.out_features), dtype=x.dtype if whole else torch.float32, device=x.device
    )
    feature = first = 0
    for part, parts in zip(weight.parts, splits, strict=True):
        columns = x[:, feature : feature + part.in_features]
        launch = _grouped if takes_groups(part, shape) else _multiply
        launch(
            columns, part, out, bias if whole else None, blocks,
            count=count, splits=parts, first=first, shape=shape, share=share,
        )  # fmt: skip
        feature += part.in_features
        first += parts
    return out


def _multiply(
    x: Tensor,
    part: Packed,
    out: Tensor,
    bias: Tensor | None,
    blocks: tuple[Tensor, Tensor] | None,
    *,
    count: int,
    splits: int,
    first: int,
    shape: Shape,
    share: int,
) -> None:
    arranged, spare, _ = (x, x, x) if part.layout == "dense" else arrange(x, part, grouped=False)
    # `spare` stands for tensors that this layout does not read.
    multiply_kernel[(count, triton.cdiv(part.out_features, features_for(part.layout, shape)), splits)](
        arranged,
        spare,
        part.codes,
        spare if part.column_scale is None else part.column_scale,
        spare if part.group_scales is None else part.group_scales,
        spare if part.multiplier is None else part.multiplier,
        spare if part.addend is None else part.addend,
        spare if part.exact is None else part.exact,
        spare if blocks is None else blocks[0],
        spare if blocks is None else blocks[1],
        spare if bias is None else bias,
        out,
        out.shape[1],
        part.out_features,
        part.in_features,
        part.tiles,
        triton.cdiv(part.tiles, splits),
        0 if part.group_scales is None else part.group_scales.shape[1],
        arranged.stride(0),
        0 if part.multiplier is None or part.multiplier.dim() == 1 else 1,
        first,
        LAYOUT=part.layout,
        WORDS=part.words,
        PLANES=part.planes,
        GROUP_TILES=group_tiles(part),
        GROUPS=part.groups,
        Q=part.elements,
        BN=features_for(part.layout, shape),
        BT=shape.rows,
        EXPERTS=blocks is not None,
        SHARE=share,
        BIAS=bias is not None,
        ASM=_asm(arranged),
        num_warps=shape.warps,
        num_stages=_stages(part, shape, device=x.device),
        enable_fp_fusion=True,
    )


def _grouped(
    x: Tensor,
    part: Packed,
    out: Tensor,
    bias: Tensor | None,
    blocks: tuple[Tensor, Tensor] | None,
    *,
    count: int,
    splits: int,
    first: int,
    shape: Shape,
    share: int,
) -> None:
    arranged, unit, sums = arrange(x, part, grouped=True)
    columns = columns_for(part, shape)
    stages = _stages(part, shape, columns=columns, device=x.device)
    # `unit` stands for tensors that this layout does not read.
    grouped_kernel[(count, triton.cdiv(part.out_features, features_for(part.layout, shape)), splits)](
        arranged,
        unit,
        sums,
        part.codes,
        part.column_scale,
        part.group_scales,
        unit if part.zeros is None else part.zeros,
        unit if part.multiplier is None else part.multiplier,
        unit if part.addend is None else part.addend,
        unit if part.exact is None else part.exact,
        unit if blocks is None else blocks[0],
        unit if blocks is None else blocks[1],
        unit if bias is None else bias,
        out,
        out.shape[1],
        part.out_features,
        part.tiles,
        triton.cdiv(part.tiles, splits),
        0 if part.group_scales is None else part.group_scales.shape[1],
        0 if part.multiplier is None or part.multiplier.dim() == 1 else 1,
        first,
        LAYOUT=part.layout,
        WORDS=part.words,
        PLANES=part.planes,
        WIDTH=part.width or 1,
        GROUP_TILES=group_tiles(part),
        GROUPS=part.groups,
        RUN=part.run,
        Q=part.elements,
        BN=features_for(part.layout, shape),
        BT=columns,
        ROWS=shape.rows,
        EXPERTS=blocks is not None,
        SHARE=share,
        BIAS=bias is not None,
        ASM=_asm(arranged),
        STAGES=stages,
        num_warps=shape.warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def _stages(part: Packed, shape: Shape, *, columns: int | None = None, device: torch.device) -> int:
    return stages_for(
        part.layout, shape, words=part.words, planes=part.planes, groups=part.groups, elements=part.elements,
        fields=part.fields, columns=columns, shared_bytes=_shared_bytes(device),
    )  # fmt: skip


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Of a program; by the number by which Triton refuses to launch."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return min(SHARED_BYTES, int(properties["max_shared_mem"]))


def _asm(arranged: Tensor) -> bool:
    return arranged.dtype == torch.float16 and not triton.knobs.runtime.interpret
