"""Packed weights as the GPU kernels read them: re-laid once, at load.

A matrix is cut along its input features into tiles of Q bytes a column. A byte has W windows (int8 1, int4 2, CCQ 4, a
bit plane 8), so a tile spans ``Q W`` input features, and window j of byte q meets activation ``tile Q W + j Q + q`` of
a row arranged in that order (`kernels.gpu.arrange`): whatever order a format has costs nothing while multiplying. The
bytes of a tile stand column after column, ``codes[..., tile, n, q]``, so that a program's [BN, Q] is one run of memory.

Bytes taken, against the operand's: int8, int4 the same codes and an fp32 scale a column (2 or 0 bytes more); CCQ the
same codes and group scales, 12 bytes a column instead of 10; bit planes the same and 4 bytes a column. No tile is
padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.gpu import words
from kernels.operands import BitplaneWeight, CcqWeight, Int4Weight, Int8Weight
from kernels.reference.dequantize import GROUP

Layout = Literal["dense", "int8", "int4", "ccq", "planes"]
WINDOWS: dict[Layout, int] = {"dense": 1, "int8": 1, "int4": 2, "ccq": 4, "planes": 8}
"""Weights in a byte (for dense, in an element)."""
PLANES = (2, 3, 4)
"""Bit planes that there are kernels for."""
PLANE_BYTES = (32, 16)
"""Q of bit planes: 256 input features if they divide K, or 128. Below 32 Triton takes operands through shared
memory."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix, or a stack of E, re-laid. A single matrix is a stack of one.

    Attributes:
        layout: what the bytes are.
        codes: uint8 [E, tiles, N, Q]; bit planes [E, tiles, planes, N, Q]; dense [E, N, K] in the compute dtype.
        column_scale: fp32 [E, N], applied to the sums; None for dense.
        group_scales: CCQ uint8 [E, ceil(K/128), N]; bit planes fp16 [E, K/G, planes + 1, N]; otherwise None.
        multiplier: CCQ int32 [E, N], see `kernels.gpu.words`; otherwise None.
        addend: likewise; for `words.PAIR_SHIFT` twice, in the lower and the upper 16 bits.
        order: int32 [Q W], the input feature of a tile at each of its places; None if they stand in order.
        in_features: K.
        word_shift: CCQ: `words.PAIR_SHIFT`, `words.WIDE_SHIFT`, or 0 for fp32.
        group_size: bit planes: input features of a coefficient.
    """

    layout: Layout
    codes: Tensor
    in_features: int
    column_scale: Tensor | None = None
    group_scales: Tensor | None = None
    multiplier: Tensor | None = None
    addend: Tensor | None = None
    order: Tensor | None = None
    word_shift: int = 0
    group_size: int = 0

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[1 if self.layout == "dense" else -2]

    @property
    def tile_bytes(self) -> int:
        """Q; for dense, how many input features a tile has."""
        return 64 if self.layout == "dense" else self.codes.shape[-1]

    @property
    def tiles(self) -> int:
        """Tiles along K."""
        return -(-self.in_features // (self.tile_bytes * WINDOWS[self.layout]))

    @property
    def planes(self) -> int:
        """Bit planes; 0 for other layouts."""
        return self.codes.shape[2] if self.layout == "planes" else 0

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        held = (self.codes, self.column_scale, self.group_scales, self.multiplier, self.addend, self.order)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


@dataclass(frozen=True, slots=True)
class GpuPrepared:
    """What `kernels.gpu.prepare` makes of all but a plain dense matrix: parts side by side along K, usually one."""

    parts: tuple[Packed, ...]

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


def stacked(tensor: Tensor, *, dims: int) -> Tensor:
    """With a leading dimension of experts, of size one if `tensor` is a single matrix's, which has `dims`."""
    return tensor.unsqueeze(0) if tensor.dim() == dims else tensor


def _tiled(codes: Tensor, size: int) -> Tensor:
    """[E, N, bytes] -> [E, tiles, N, Q]."""
    experts, n, count = codes.shape
    return codes.view(experts, n, count // size, size).transpose(1, 2).contiguous()


def int8(weight: Int8Weight) -> Packed | None:
    """Values plus 128, in order; None unless K is a multiple of 32."""
    values = stacked(weight.values, dims=2)
    k = values.shape[-1]
    if k % 32:
        return None
    codes = (values.contiguous().view(torch.uint8) ^ 128).contiguous()
    scale = stacked(weight.scale, dims=1).float().contiguous()
    return Packed("int8", _tiled(codes, 64 if k % 64 == 0 else 32), k, column_scale=scale)


def int4(weight: Int4Weight) -> Packed | None:
    """Byte q of a tile: input feature q in the low nibble and Q + q in the high one; None unless K % 64 == 0."""
    packed = stacked(weight.packed, dims=2)  # [E, N, K/2]
    experts, n, half = packed.shape
    if half % 32:
        return None
    size = 64 if half % 64 == 0 else 32
    pairs = packed.reshape(experts, n, half // size, size)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)  # [E, N, tiles, 2Q] in order
    codes = nibbles[..., :size] | (nibbles[..., size:] << 4)
    scale = stacked(weight.scale, dims=1).float().contiguous()
    return Packed("int4", codes.transpose(1, 2).contiguous(), half * 2, column_scale=scale)


def ccq(weight: CcqWeight) -> Packed:
    """Up to four groups of 64 a tile, dealt to the four threads that share a column in a tensor core's operand.

    Byte ``4 G b + 4 t + i`` of a tile of G groups is byte ``4 b + i`` of its group t: a thread that takes four bytes in
    every 16 (Triton's layout for 8-bit operands of fp16 products) sees one group, and one scale, in all of them. An odd
    number of groups leaves tiles of one, whose 16 bytes Triton takes through shared memory after decoding: correct,
    and about twice the instructions.
    """
    codes = stacked(weight.codes, dims=2)  # [E, K/4, N]
    experts, quarter, n = codes.shape
    groups = quarter // 16
    per_tile = next(count for count in (4, 2, 1) if groups % count == 0)
    # [E, tiles, group t, b, i, N] -> [E, tiles, N, b, t, i]
    dealt = codes.reshape(experts, groups // per_tile, per_tile, 4, 4, n).permute(0, 1, 5, 3, 2, 4)
    scale, zero = stacked(weight.code_scale, dims=1).float(), stacked(weight.code_zp, dims=1).float()
    for shift in (words.PAIR_SHIFT, words.WIDE_SHIFT):
        found = words.lines(scale, zero, shift=shift)
        if found is not None:
            break
    else:
        shift = 0
        found = scale.contiguous().view(torch.int32), zero.contiguous().view(torch.int32)
    column_scale = stacked(weight.super_scales, dims=1).float() * (0.5 if shift else 1.0)
    return Packed(
        "ccq",
        dealt.reshape(experts, groups // per_tile, n, 16 * per_tile).contiguous(),
        quarter * 4,
        column_scale=column_scale.contiguous(),
        group_scales=stacked(weight.group_scales, dims=2).contiguous(),
        multiplier=found[0],
        addend=found[1] * 0x10001 if shift == words.PAIR_SHIFT else found[1],  # in both halves, for two bytes
        order=_ccq_order(per_tile, permuted=weight.row_order == "permuted").to(codes.device),
        word_shift=shift,
    )


def _ccq_order(groups: int, *, permuted: bool) -> Tensor:
    """int32 [256 or less]: the input feature of a tile that window j of byte q holds, at place ``j Q + q``."""
    stored = torch.arange(GROUP * groups, dtype=torch.int32).view(groups, 4, 4, 4)  # [t, b, i, j]
    if permuted:  # stored row 16a + 2b + c of a group is row 8b + 2a + c
        row = stored % GROUP
        stored = stored - row + 8 * (row % 16 // 2) + 2 * (row // 16) + row % 2
    return stored.permute(3, 1, 0, 2).flatten().contiguous()


def planes(weight: BitplaneWeight) -> Packed | None:
    """Byte q of a tile holds input features 8q ... 8q + 7, in order; None unless K % 128 == 0 and G fits the tiles.

    Coefficients become fp16 relative to a power of two of their column, so that none overflows and the largest keeps
    all bits of a bf16.
    """
    words32 = stacked(weight.planes, dims=3)  # [E, K/32, k, N]
    coefficients = stacked(weight.coefficients, dims=3).float()  # [E, K/G, k+1, N]
    experts, count, k, n = words32.shape
    size = count * 32 // coefficients.shape[1]
    fitting = [q for q in PLANE_BYTES if count * 4 % q == 0 and (size % (8 * q) == 0 or 8 * q % size == 0)]
    if not fitting or k not in PLANES:
        return None
    tile = fitting[0]
    bytes_ = words32.contiguous().unsqueeze(-1).view(torch.uint8)  # [E, K/32, k, N, 4]: little end first
    codes = bytes_.view(experts, count * 4 // tile, tile // 4, k, n, 4).permute(0, 1, 3, 4, 2, 5)
    largest = coefficients.abs().amax(dim=(1, 2), keepdim=True).clamp(min=2.0**-100)
    unit = torch.exp2(torch.floor(torch.log2(largest)))
    order = torch.arange(8 * tile, dtype=torch.int32, device=codes.device).view(tile, 8).t().flatten().contiguous()
    return Packed(
        "planes",
        codes.reshape(experts, count * 4 // tile, k, n, tile).contiguous(),
        count * 32,
        column_scale=unit[:, 0, 0].contiguous(),
        group_scales=(coefficients / unit).to(torch.float16).contiguous(),
        order=order,
        group_size=size,
    )
