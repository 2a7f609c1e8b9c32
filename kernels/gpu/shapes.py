"""Shapes of programs for products, and how many of them: all follows from sizes known without the device."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from kernels.gpu import assembly
from kernels.gpu.packed import GROUPED_LAYOUTS, GpuPrepared, Layout, Packed

PROGRAMS = 1056
"""Programs worth having, so that every multiprocessor of an H100 (132) has eight: two warps each, so that enough loads
are in flight while some of them decode."""
MIN_TILES = 4
"""Fewest tiles of K that are worth a program, whose sums are then written and read again."""
COLUMNS = 8
"""Of a tensor core's second operand, at least."""
MOST_COLUMNS = 128
"""Of `kernels.gpu.grouped`: sums of more would not fit the registers."""
PLANE_COLUMNS = 16
"""Of bit planes there."""
SHARED_BYTES = 163 * 1024
"""Of an A100's shared memory that a program can have; 64 KiB more of a Hopper GPU's (CUDA C++ Programming Guide)."""


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
FEW = (Shape(128, 2, 2, 4), Shape(64, 4, 2, 4))
"""Before these, for weights whose scales change along K (`kernels.gpu.grouped`). Wider programs share a tile of
activations among more weights, which is what is left to save once a weight costs a mask."""


def shape_for(rows: int, *weights: GpuPrepared) -> Shape:
    """The shape for `rows` rows of activations that share a matrix of each of `weights`."""
    parts = [part for weight in weights for part in weight.parts]
    shapes = FEW + SHAPES if any(part.layout in GROUPED_LAYOUTS for part in parts) else SHAPES
    most = min((MOST_COLUMNS // part.groups for part in parts if part.layout == "grouped"), default=MOST_COLUMNS)
    possible = [shape for shape in shapes if shape.rows <= most]
    return next((shape for shape in possible if rows <= shape.rows), possible[-1])


def expert_rows(tokens: int, *, top_k: int, experts: int) -> int:
    """Rows for `shape_for` of experts: what each gets of `tokens` if they spread evenly, twice over.

    Never more than there are tokens: the experts of one differ.
    """
    return min(tokens, 2 * triton.cdiv(tokens * top_k, experts))


def features_for(layout: Layout, shape: Shape) -> int:
    """Output features of a program: fewer where sums of planes, or of groups beside all, want registers too."""
    few = shape.rows <= SHAPES[1].rows
    return shape.features // 2 if (layout == "planes" and few) or (layout == "grouped" and not few) else shape.features


def stages_for(
    layout: Layout,
    shape: Shape,
    *,
    words: int,
    planes: int,
    groups: int,
    elements: int,
    fields: int,
    columns: int | None = None,
    shared_bytes: int = SHARED_BYTES,
) -> int:
    """Depth of the pipeline: the shape's, or less where that is more shared memory than a multiprocessor has.

    All stages but the newest stand there, each with codes and with the activations for all their fields; CCQ_MIXED has
    two loops with stages of their own. On Hopper the newest one's activations stand there too, at most 64 KiB: so much
    more it has.

    Args:
        layout: `Packed.layout`, as all that follows.
        shape: of the programs.
        words: of CCQ.
        planes: bit planes.
        groups: of a tile.
        elements: Q.
        fields: F.
        columns: `columns_for` in `kernels.gpu.grouped`, whose sums of groups are added there; None in
            `kernels.gpu.multiply`.
        shared_bytes: that a program can have, at most `SHARED_BYTES`; on GeForce and L cards 99 KiB.
    """
    features = features_for(layout, shape)
    item = 1 if layout in ("int8", "int4") else 2
    stage = 2 * fields * elements * (columns or shape.rows) + item * max(planes, 1) * features * elements
    loops = 2 if layout == "ccq" and words == assembly.CCQ_MIXED.value else 1
    # What the compiler was seen to take to bring scales, or sums of groups, from one layout of registers to another.
    scratch = loops * features * max(16, 2 * groups) if columns is None else 4 * features * columns + 1024
    return min(shape.stages, 1 + (shared_bytes - scratch) // (loops * stage))


def takes_groups(weight: Packed, shape: Shape) -> bool:
    """Whether `kernels.gpu.grouped` multiplies: grouped integers always, the others where rows are few.

    Bit planes cost so much more to scale one by one that more columns of the product are worth it.
    """
    if weight.layout == "planes" and shape.rows * weight.groups <= PLANE_COLUMNS:
        return True
    return weight.layout == "grouped" or (weight.layout in GROUPED_LAYOUTS and shape in FEW)


def columns_for(weight: Packed, shape: Shape) -> int:
    """Columns of the second operand in `kernels.gpu.grouped`."""
    return max(COLUMNS, shape.rows * weight.groups)


def group_tiles(weight: Packed) -> int:
    """Tiles of a group, if it has more than one."""
    return max(1, weight.group_size // weight.tile)


def splits_for(weight: Packed, *, blocks: int, shape: Shape) -> int:
    """Into how many parts K is cut, so that there are about `PROGRAMS` programs."""
    programs = blocks * triton.cdiv(weight.out_features, features_for(weight.layout, shape))
    wanted = max(1, min(PROGRAMS // max(programs, 1), weight.tiles // MIN_TILES, 16))
    return triton.cdiv(weight.tiles, triton.cdiv(weight.tiles, wanted))  # no program without a tile
