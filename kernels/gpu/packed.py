"""Packed weights as the GPU kernels read them: re-laid once, at load.

A matrix is cut along its input features into tiles of Q elements a column. An element (a byte of int8 and int4, 16 bits
of the others) has F fields, so a tile spans ``Q F`` input features, and field f of element e meets activation
``tile Q F + f Q + e`` of a row arranged in that order (`kernels.gpu.arrange`): whatever order a format has costs
nothing while multiplying. The elements of a tile stand column after column, ``codes[..., tile, n, e]``, so that a
program's [BN, Q] is one run of memory; behind the last column of all, `SPARE` elements may be read.

Formats with scales of groups of input features have one or more groups in a tile. Element e is of the tile's group
``e // run % groups``.

Bytes taken, against the operand's: int8, int4 the same; CCQ the same codes and group scales, and 10 bytes a column, or
2 where all columns have one codebook; the others the same. Input features that fill no tile are filled up with weights
of zero: CCQ's to an even number of groups of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["dense", "int8", "int4", "ccq", "planes", "grouped"]
GROUPED_LAYOUTS = frozenset(("ccq", "planes", "grouped"))
"""Those whose scales change along the input features; their elements have 16 bits."""
BLOCK = 128
"""Output features that are marked together for exact words; programs take no more of them."""
SPARE = BLOCK * 64
"""Elements, or bytes of CCQ: a program reads whole blocks of columns, also where there are fewer."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix, or a stack of E, re-laid. A single matrix is a stack of one.

    Attributes:
        layout: what the elements are.
        codes: uint8 or int16 [E, tiles, N, Q]; bit planes [E, tiles, planes, N, Q]; dense [E, N, K] in the compute
            dtype.
        in_features: K.
        column_scale: [E, N], applied to the sums; None for dense.
        group_scales: CCQ int16, or int8 for tiles of two groups, [E, tiles, N], 4 bits a group, the first lowest; bit
            planes fp16 [E, groups, planes + 1, N]; grouped integers [E, groups, N]; otherwise None.
        zeros: grouped integers uint8 [E, groups, N]; otherwise None.
        multiplier: CCQ int32 [E, N], or [1] for all columns, see `kernels.gpu.words`; otherwise None.
        addend: likewise; for `CCQ_PAIR` twice, in the lower and the upper 16 bits.
        exact: `CCQ_MIXED` uint8 [E, blocks], 1 where multiplier and addend are fp32; otherwise None.
        order: int32 [Q F]: the input feature of a tile at each of its places, and from bit 16 on, the power of two that
            the activation is divided by; None if they stand in order.
        words: of CCQ, see `kernels.gpu.decode`.
        width: bits of a field of grouped integers.
        group_size: bit planes and grouped integers: input features of a group.
        groups: in a tile; 1 if a group has several tiles.
        run: elements of a tile that stand together and are of one group.
    """

    layout: Layout
    codes: Tensor
    in_features: int
    column_scale: Tensor | None = None
    group_scales: Tensor | None = None
    zeros: Tensor | None = None
    multiplier: Tensor | None = None
    addend: Tensor | None = None
    exact: Tensor | None = None
    order: Tensor | None = None
    words: int = 0
    width: int = 0
    group_size: int = 0
    groups: int = 1
    run: int = 1

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[1 if self.layout == "dense" else -2]

    @property
    def elements(self) -> int:
        """Q; for dense, how many input features a tile has."""
        return 64 if self.layout == "dense" else self.codes.shape[-1]

    @property
    def fields(self) -> int:
        """F, weights in an element."""
        return 16 // self.width if self.layout == "grouped" else FIELDS[self.layout]

    @property
    def tile(self) -> int:
        """Input features of a tile."""
        return self.elements * self.fields

    @property
    def tiles(self) -> int:
        """Tiles along K."""
        return -(-self.in_features // self.tile)

    @property
    def planes(self) -> int:
        """Bit planes; 0 for other layouts."""
        return self.codes.shape[2] if self.layout == "planes" else 0

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        held = (self.codes, self.column_scale, self.group_scales, self.zeros)
        held += (self.multiplier, self.addend, self.exact, self.order)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


FIELDS: dict[Layout, int] = {"dense": 1, "int8": 1, "int4": 2, "ccq": 8, "planes": 16}


@dataclass(frozen=True, slots=True)
class GpuPrepared:
    """What `kernels.gpu.prepare` makes of all but a plain dense matrix: parts side by side along K, usually one.

    Attributes:
        parts: along K.
        dtype: of activations; what rows are looked up in, for a table of embeddings.
    """

    parts: tuple[Packed, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def out_features(self) -> int:
        """N."""
        return self.parts[0].out_features

    @property
    def in_features(self) -> int:
        """K."""
        return sum(part.in_features for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(part.num_bytes for part in self.parts)
