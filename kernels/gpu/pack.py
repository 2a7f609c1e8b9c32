"""Operands of `kernels.operands` re-laid as `kernels.gpu.packed` says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu import assembly, words
from kernels.gpu.packed import BLOCK, SPARE, Packed
from kernels.operands import BitplaneWeight, CcqWeight, GroupedWeight, Int4Weight, Int8Weight
from kernels.reference.dequantize import GROUP

PLANES = (2, 3, 4)
"""Bit planes that there are kernels for."""
ELEMENTS = (32, 16)
"""Q of bit planes and grouped integers: the first that fits. A tensor core's instruction takes 16."""
LARGEST_TILE_GROUPS = 16
"""Groups of a tile, at most."""


def stacked(tensor: Tensor, *, dims: int) -> Tensor:
    """With a leading dimension of experts, of size one if `tensor` is a single matrix's, which has `dims`."""
    return tensor.unsqueeze(0) if tensor.dim() == dims else tensor


def _spared(codes: Tensor) -> Tensor:
    """A contiguous copy, the only one that is made of a view, with `SPARE` elements behind it that may be read."""
    room = torch.empty(codes.numel() + SPARE, dtype=codes.dtype, device=codes.device)
    room[codes.numel() :] = 0
    out = room[: codes.numel()].view(codes.shape)
    return out.copy_(codes)


def _tiled(codes: Tensor, size: int) -> Tensor:
    """[E, N, elements] -> [E, tiles, N, Q]."""
    experts, n, count = codes.shape
    return _spared(codes.view(experts, n, count // size, size).transpose(1, 2))


def _placed(features: Tensor, positions: list[int]) -> Tensor:
    """`Packed.order` of features [F, Q] whose field f stands at ``positions[f]`` of the mantissa."""
    shifts = torch.tensor(positions, dtype=torch.int32) - min(positions)
    return (features.to(torch.int32) | shifts.unsqueeze(1) << 16).flatten().contiguous()


def int8(weight: Int8Weight) -> Packed | None:
    """Values plus 128, in order; None unless K is a multiple of 32."""
    values = stacked(weight.values, dims=2)
    k = values.shape[-1]
    if k % 32:
        return None
    codes = values.contiguous().view(torch.uint8) ^ 128
    return Packed("int8", _tiled(codes, 64 if k % 64 == 0 else 32), k, column_scale=stacked(weight.scale, dims=1))


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
    return Packed("int4", _spared(codes.transpose(1, 2)), half * 2, column_scale=stacked(weight.scale, dims=1))


def ccq(weight: CcqWeight) -> Packed | None:
    """Up to four groups of 64 a tile, dealt to the four threads that share a column in a tensor core's operand.

    Byte ``4 G b + 4 t + i`` of a tile of G groups is byte ``4 b + i`` of its group t: a register, four bytes, is of one
    group, and a thread that has every fourth register sees one group, and one scale, in all of them. None for words
    that no kernel makes (`words.possible`).
    """
    codes, nibbles = stacked(weight.codes, dims=2), stacked(weight.group_scales, dims=2)
    experts, quarter, n = codes.shape
    held = quarter // 16
    scale, zero = stacked(weight.code_scale, dims=1).float(), stacked(weight.code_zp, dims=1).float()
    if not words.possible(scale, zero):
        return None
    scales = torch.stack((nibbles >> 4, nibbles & 15), dim=2).flatten(1, 2)[:, :held]  # even group = high nibble
    groups = held + held % 2
    if groups > held:
        codes, scales = F.pad(codes, (0, 0, 0, 16)), F.pad(scales, (0, 0, 0, 1))
    per_tile = 4 if groups % 4 == 0 else 2
    tiles = groups // per_tile
    # [E, tiles, group t, b, i, N] -> [E, tiles, N, b, t, i]
    dealt = _spared(codes.reshape(experts, tiles, per_tile, 4, 4, n).permute(0, 1, 5, 3, 2, 4))
    places = 16 ** torch.arange(per_tile, dtype=torch.int32, device=codes.device).unsqueeze(-1)
    together = (scales.view(experts, tiles, per_tile, n).to(torch.int32) * places).sum(dim=2)  # [E, tiles, N]
    kind, multiplier, addend, exact = _lines(scale, zero)
    return Packed(
        "ccq",
        dealt.view(experts, tiles, n, 16 * per_tile).view(torch.int16),
        held * GROUP,
        column_scale=stacked(weight.super_scales, dims=1).contiguous(),
        group_scales=_spared(together.to(torch.int16 if per_tile == 4 else torch.int8)),  # the same bits, signed
        multiplier=multiplier,
        addend=addend,
        exact=exact,
        order=_ccq_order(per_tile, permuted=weight.row_order == "permuted").to(codes.device),
        words=kind,
        groups=per_tile,
        run=2,
    )


def _lines(scale: Tensor, zero: Tensor) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """How the words of columns [E, N] are made: `Packed.words`, multiplier, addend and exact."""
    first = words.lines(scale[:1, :1], zero[:1, :1], shift=words.PAIR_SHIFT)
    found = words.lines(scale, zero, shift=words.PAIR_SHIFT) if bool(first.there.all()) else first
    if bool(found.there.all()):
        # In both halves, for two bytes.
        return assembly.CCQ_PAIR.value, *_shared(found.multiplier, found.addend * 0x10001), None
    found = words.lines(scale, zero, shift=words.WIDE_SHIFT)
    if bool(found.there.all()):
        return assembly.CCQ_WIDE.value, *_shared(found.multiplier, found.addend), None
    experts, n = scale.shape
    blocks = -(-n // BLOCK)
    missing = F.pad(~found.there, (0, blocks * BLOCK - n)).view(experts, blocks, BLOCK).any(dim=-1)
    columns = missing.repeat_interleave(BLOCK, dim=1)[:, :n]
    multiplier = torch.where(columns, scale.contiguous().view(torch.int32), found.multiplier)
    addend = torch.where(columns, zero.contiguous().view(torch.int32), found.addend)
    if bool(missing.all()):
        return assembly.CCQ_EXACT.value, *_shared(multiplier, addend), None
    return assembly.CCQ_MIXED.value, multiplier, addend, missing.to(torch.uint8)


def _shared(multiplier: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """One pair instead of many equal ones."""
    if bool((multiplier == multiplier[0, 0]).all() & (addend == addend[0, 0]).all()):
        return multiplier[0, :1].clone(), addend[0, :1].clone()
    return multiplier, addend


def _ccq_order(groups: int, *, permuted: bool) -> Tensor:
    """`Packed.order`: field ``2 j + h`` of element e is window j of byte ``2 e + h``."""
    stored = torch.arange(GROUP * groups, dtype=torch.int32).view(groups, 4, 4, 4)  # [t, b, i, j]
    if permuted:  # stored row 16a + 2b + c of a group is row 8b + 2a + c
        row = stored % GROUP
        stored = stored - row + 8 * (row % 16 // 2) + 2 * (row // 16) + row % 2
    windows = stored.permute(3, 1, 0, 2).reshape(4, -1, 2)  # [j, e, h]
    positions = [assembly.CCQ_LOW if field // 2 % 2 else assembly.CCQ_HIGH for field in range(8)]
    return _placed(windows.transpose(1, 2).reshape(8, -1), positions)


def planes(weight: BitplaneWeight) -> Packed | None:
    """Element e of a tile holds input features ``16 e ... 16 e + 15``; None for groups that fit no tile.

    Coefficients become fp16 relative to a power of two of their column, so that none overflows and the largest keeps
    all bits of a bf16.
    """
    words32 = stacked(weight.planes, dims=3)  # [E, K/32, k, N]
    coefficients = stacked(weight.coefficients, dims=3).float()  # [E, K/G, k+1, N]
    experts, count, k, n = words32.shape
    size = count * 32 // coefficients.shape[1]
    elements = _elements(count * 32, size, fields=16, groups=4)
    if elements is None or k not in PLANES:
        return None
    tiles = -(-count * 2 // elements)
    halves = words32.contiguous().unsqueeze(-1).view(torch.int16)  # [E, K/32, k, N, 2]: little end first
    halves = F.pad(halves, (0, 0, 0, 0, 0, 0, 0, tiles * elements // 2 - count))
    codes = halves.view(experts, tiles, elements // 2, k, n, 2).permute(0, 1, 3, 4, 2, 5)
    largest = coefficients.abs().amax(dim=(1, 2), keepdim=True).clamp(min=2.0**-100)
    unit = torch.exp2(torch.floor(torch.log2(largest)))
    scales = _whole((coefficients / unit).to(torch.float16), tiles * elements * 16, size)
    return Packed(
        "planes",
        _spared(codes).view(experts, tiles, k, n, elements),
        count * 32,
        column_scale=unit[:, 0, 0].contiguous(),
        group_scales=_spared(scales),
        order=_field_order(elements, 1).to(codes.device),
        group_size=size,
        groups=max(1, elements * 16 // size),
        run=min(elements, size // 16),
    )


def grouped(weight: GroupedWeight) -> Packed | None:
    """Element e of a tile holds its ``16 / bits`` input features in order; None for groups that fit no tile."""
    words32, scales = stacked(weight.codes, dims=2), stacked(weight.scales, dims=2)
    experts, count, n = words32.shape
    k, fields = count * 32 // weight.bits, 16 // weight.bits
    size = k // scales.shape[1]
    elements = _elements(k, size, fields=fields, groups=1)
    if elements is None:
        return None
    tiles = -(-count * 2 // elements)
    halves = F.pad(words32.contiguous().unsqueeze(-1).view(torch.int16), (0, 0, 0, 0, 0, tiles * elements // 2 - count))
    codes = halves.view(experts, tiles, elements // 2, n, 2).permute(0, 1, 3, 2, 4)
    zeros = _whole(stacked(weight.zeros, dims=2), tiles * elements * fields, size)
    return Packed(
        "grouped",
        _spared(codes).view(experts, tiles, n, elements),
        k,
        column_scale=torch.ones((experts, n), dtype=scales.dtype, device=scales.device),
        group_scales=_spared(_whole(scales, tiles * elements * fields, size)),
        zeros=_spared(zeros),
        order=_field_order(elements, weight.bits).to(codes.device),
        width=weight.bits,
        group_size=size,
        groups=max(1, elements * fields // size),
        run=min(elements, size // fields),
    )


def _elements(k: int, size: int, *, fields: int, groups: int) -> int | None:
    """Elements of a tile: K filled if that is possible, and no more than so many groups in it if that is."""
    fitting = [
        e
        for e in ELEMENTS
        if (size % (e * fields) == 0 or e * fields % size == 0) and e * fields <= size * LARGEST_TILE_GROUPS
    ]
    if not fitting or size % fields:
        return None
    return min(fitting, key=lambda e: (k % (e * fields) != 0, e * fields > size * groups, -e))


def _whole(of_groups: Tensor, features: int, size: int) -> Tensor:
    """[E, K/G, ...] with as many groups as `features` have."""
    missing = -(-features // size) - of_groups.shape[1]
    return F.pad(of_groups, (0, 0) * (of_groups.dim() - 2) + (0, missing))


def _field_order(elements: int, width: int) -> Tensor:
    """`Packed.order` where an element's fields are neighbours."""
    fields = 16 // width
    features = torch.arange(elements * fields, dtype=torch.int32).view(elements, fields).t()
    return _placed(features, [assembly.position(field, width) for field in range(fields)])
