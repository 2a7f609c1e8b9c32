"""Shapes of programs, and the launches of `kernels.gpu.multiply`: all follows from sizes known without the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.gpu.arrange import arrange_kernel
from kernels.gpu.decode import CCQ_EXACT, CCQ_PAIR, CCQ_WIDE
from kernels.gpu.multiply import multiply_kernel
from kernels.gpu.pack import PLANE_BYTES, WINDOWS, GpuPrepared, Layout, Packed
from kernels.gpu.variant import Variant
from kernels.gpu.words import PAIR_SHIFT, WIDE_SHIFT

WORDS = {PAIR_SHIFT: CCQ_PAIR.value, WIDE_SHIFT: CCQ_WIDE.value, 0: CCQ_EXACT.value}
PROGRAMS = 1056
"""Programs worth having, so that every multiprocessor of an H100 (132) has eight: two warps each, so that enough loads
are in flight while some of them decode."""
MIN_TILES = 4
"""Fewest tiles of K that are worth a program, whose sums are then written and read again."""
ARRANGE_BLOCK = 4096
"""Activations of a row that a program brings in order at a time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a program: output features, rows of activations, warps, depth of the pipeline.

    Two warps in decode keep Triton from Hopper's warp-group instructions, which want the weights' bytes two by two and
    cost a third more instructions to decode.
    """

    features: int
    rows: int
    warps: int
    stages: int


SHAPES = (Shape(64, 8, 2, 4), Shape(64, 16, 2, 4), Shape(128, 32, 8, 3), Shape(128, 64, 8, 3))
"""The shape with the fewest rows that is enough is taken; the last for more."""


def shape_for(rows: int) -> Shape:
    """The shape for `rows` rows of activations that share a matrix."""
    return next((shape for shape in SHAPES if rows <= shape.rows), SHAPES[-1])


def features_for(layout: Layout, shape: Shape) -> int:
    """Output features of a program. Eight windows of a bit plane's byte want twice the registers of CCQ's four."""
    return shape.features // 2 if layout == "planes" and shape.rows <= SHAPES[1].rows else shape.features


def splits_for(weight: Packed, *, blocks: int, shape: Shape) -> int:
    """Into how many parts K is cut, so that there are about `PROGRAMS` programs."""
    programs = blocks * triton.cdiv(weight.out_features, features_for(weight.layout, shape))
    wanted = max(1, min(PROGRAMS // max(programs, 1), weight.tiles // MIN_TILES, 16))
    return triton.cdiv(weight.tiles, triton.cdiv(weight.tiles, wanted))  # no program without a tile


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of activations that meet packed weights: fp16 for 16-bit activations; fp32 for the interpreter's tests."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def arrange(x: Tensor, weight: Packed) -> tuple[Tensor, Tensor]:
    """[T, K] of row stride any, features contiguous -> (arranged [T, K], unit fp32 [T])."""
    tokens, k = x.shape
    out = torch.empty((tokens, k), dtype=compute_dtype(x.dtype), device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(k), ARRANGE_BLOCK)
    arrange_kernel[(tokens,)](
        x,
        unit if weight.order is None else weight.order,
        out,
        unit,
        k,
        x.stride(0),
        ROWS=weight.tile_bytes * WINDOWS[weight.layout],
        PERMUTE=weight.order is not None,
        BLOCK=block,
        num_warps=8,
    )
    return out, unit


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
        arranged, unit = (columns, columns) if part.layout == "dense" else arrange(columns, part)
        spare = unit  # stands for tensors that this layout does not read
        multiply_kernel[(count, triton.cdiv(part.out_features, features_for(part.layout, shape)), parts)](
            arranged,
            unit,
            part.codes,
            spare if part.column_scale is None else part.column_scale,
            spare if part.group_scales is None else part.group_scales,
            spare if part.multiplier is None else part.multiplier,
            spare if part.addend is None else part.addend,
            spare if blocks is None else blocks[0],
            spare if blocks is None else blocks[1],
            spare if bias is None else bias,
            out,
            rows,
            part.out_features,
            part.in_features,
            part.tiles,
            triton.cdiv(part.tiles, parts),
            0 if part.group_scales is None else part.group_scales.shape[1],
            arranged.stride(0),
            first,
            LAYOUT=part.layout,
            WORDS=WORDS[part.word_shift],
            PLANES=part.planes,
            GROUP_SIZE=part.group_size,
            Q=part.tile_bytes,
            BN=features_for(part.layout, shape),
            BT=shape.rows,
            EXPERTS=blocks is not None,
            SHARE=share,
            BIAS=bias is not None and whole,
            ASM=arranged.dtype == torch.float16 and not triton.knobs.runtime.interpret,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        feature += part.in_features
        first += parts
    return out


_SIGNATURE = {
    "x_ptr": "*fp16",
    "unit_ptr": "*fp32",
    "codes_ptr": "*u8",
    "column_ptr": "*fp32",
    "group_ptr": "*u8",
    "multiplier_ptr": "*i32",
    "addend_ptr": "*i32",
    "slot_ptr": "*i32",
    "expert_ptr": "*i32",
    "bias_ptr": "*bf16",
    "out_ptr": "*fp32",
    "T": "i32",
    "N": "i32",
    "K": "i32",
    "tiles": "i32",
    "split_tiles": "i32",
    "group_rows": "i32",
    "x_stride": "i32",
    "first_split": "i32",
}
_ALIGNED = (*(name for name in _SIGNATURE if name.endswith("_ptr")), "N", "K", "x_stride")
_DENSE = {"x_ptr": "*bf16", "unit_ptr": "*bf16", "codes_ptr": "*bf16", "group_ptr": "*bf16"}


def variants() -> list[Variant]:
    """Every layout, for one token and for many, as ERNIE-4.5's experts and matrices call it."""
    layouts: list[tuple[str, Layout, int, int, int]] = [
        ("ccq_pair", "ccq", CCQ_PAIR.value, 64, 0),
        ("ccq_wide", "ccq", CCQ_WIDE.value, 64, 0),
        ("ccq_exact", "ccq", CCQ_EXACT.value, 64, 0),
        ("int8", "int8", 0, 64, 0),
        ("int4", "int4", 0, 64, 0),
        ("planes2", "planes", 0, PLANE_BYTES[0], 2),
        ("planes4", "planes", 0, PLANE_BYTES[0], 4),
        ("dense", "dense", 0, 64, 0),
    ]
    calls = [(layout, shape, True) for layout in layouts for shape in (SHAPES[0], SHAPES[-1])]
    calls += [(layout, SHAPES[1], False) for layout in layouts if layout[0] in ("ccq_wide", "int8", "int4")]
    return [_variant(*layout, shape=shape, experts=experts) for layout, shape, experts in calls]


def _variant(name: str, layout: Layout, words: int, size: int, planes: int, *, shape: Shape, experts: bool) -> Variant:
    types = _SIGNATURE | (_DENSE if layout == "dense" else {"group_ptr": "*fp16"} if planes else {})
    features = features_for(layout, shape)
    constants = {"LAYOUT": layout, "WORDS": words, "PLANES": planes, "GROUP_SIZE": 256 if planes else 0, "Q": size}
    constants |= {"BN": features, "BT": shape.rows, "EXPERTS": experts, "SHARE": 8 if experts else 1}
    constants |= {"BIAS": False, "ASM": layout != "dense"}
    return Variant(
        f"multiply_{name}_{'experts' if experts else 'linear'}_{shape.rows}",
        multiply_kernel,
        types,
        constants,
        num_warps=shape.warps,
        num_stages=shape.stages,
        aligned=_ALIGNED,
        packed_bytes=features * size * max(planes, 1) * (2 if layout == "dense" else 1),
    )
