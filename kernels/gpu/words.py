"""CCQ's words by integers: the multiply-add that gives a byte's 15-bit word without a conversion or a rounding.

A byte c stands for ``floor(c * code_scale + code_zp + 0.5)`` in fp32 (`kernels.reference.dequantize`). A GPU does
better with ``(c * multiplier + addend) >> shift``. Both are steps of a straight line, so integers that give the same
256 words exist for nearly every pair; they are looked for when a weight is loaded, and compared word by word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE_SHIFT = 17
"""The word in the upper 15 of 32 bits: 17 bits of fraction, one byte a multiply-add."""
PAIR_SHIFT = 1
"""The word in the upper 15 of 16 bits: two bytes a multiply-add, for pairs that are multiples of one half."""
_SLOPES = 81  # slopes tried to either side of the real one: more than the roundings of the words can ask for
_COLUMNS = 8192  # columns at a time: 256 int64 words of each are 16 MiB


def words(code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """The words of all bytes: fp32 [N] twice -> int64 [256, N], with the roundings of the reference decoder."""
    codes = torch.arange(256, dtype=torch.float32, device=code_scale.device).unsqueeze(1)
    return torch.floor(codes * code_scale.float() + code_zp.float() + 0.5).to(torch.int64)


@dataclass(frozen=True, slots=True)
class Lines:
    """Integers that give columns' words.

    Attributes:
        multiplier: int32 [...] (modulo 2^32).
        addend: likewise.
        there: bool [...], whether the column has any; the other two mean nothing where it has none.
    """

    multiplier: Tensor
    addend: Tensor
    there: Tensor


def possible(code_scale: Tensor, code_zp: Tensor) -> bool:
    """Whether the kernels can make all words of fp32 [...] columns.

    Those in fp32 leave out one rounding of the reference decoder, that of the sum with 0.5. It matters for the largest
    number below 0.5 alone, which rounds to 1; and they have room for 22 bits. No sensible codebook comes near either.
    """
    if not bool(torch.isfinite(code_scale).all() & torch.isfinite(code_zp).all()):
        return False
    for scale, zero in zip(
        code_scale.flatten().float().split(_COLUMNS), code_zp.flatten().float().split(_COLUMNS), strict=True
    ):
        sums = _codes(scale.device, torch.float32) * scale + zero  # [256, columns]
        if bool((sums == 0.5 - 2.0**-25).any()) or float(sums.abs().max()) >= 2**20:
            return False
    return True


def lines(code_scale: Tensor, code_zp: Tensor, *, shift: int) -> Lines:
    """Integers that give the same words.

    Args:
        code_scale: fp32 [...], slopes.
        code_zp: fp32 [...], intercepts.
        shift: bits of fraction; `PAIR_SHIFT` also demands that every ``c * multiplier + addend`` fit 16 bits unsigned.
    """
    both = torch.stack((code_scale.float(), code_zp.float())).flatten(1)
    pairs, where = torch.unique(both, dim=1, return_inverse=True)
    found = [_fit(*pairs[:, i : i + _COLUMNS], shift=shift) for i in range(0, pairs.shape[1], _COLUMNS)]
    fits = torch.cat(found, dim=1)[:, where]  # [3, ...]
    signed = (fits[:2] + 2**31) % 2**32 - 2**31  # the same bits
    multiplier, addend = signed.to(torch.int32).view(2, *code_scale.shape)
    return Lines(multiplier.contiguous(), addend.contiguous(), fits[2].bool().view(code_scale.shape))


def _codes(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=dtype, device=device).unsqueeze(1)


def _fit(scale: Tensor, zero: Tensor, *, shift: int) -> Tensor:
    """int64 [3, N]: multiplier and addend of each column, and whether it has them.

    For a fixed multiplier the addend must put every ``c * multiplier + addend`` into its word's interval of 2^shift
    integers: 256 lower and upper bounds, so an addend exists if the greatest lower is not over the least upper. The
    room between them is a concave function of the multiplier, so its top is found by thirds.
    """
    codes = _codes(scale.device, torch.int64)
    floors = words(scale, zero) << shift  # [256, N]

    def bounds(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        rest = floors - codes * multiplier  # [256, N]
        return rest.amax(dim=0), rest.amin(dim=0) + 2**shift - 1

    def room(multiplier: Tensor) -> Tensor:
        low, high = bounds(multiplier)
        return high - low

    middle = torch.round(scale.double() * 2**shift).to(torch.int64)
    low, high = middle - _SLOPES, middle + _SLOPES
    while int((high - low).max()) > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        rising = room(left) < room(right)
        low, high = torch.where(rising, left, low), torch.where(rising, high, right)
    candidates = torch.stack([low + i for i in range(3)])  # [3, N]
    best = candidates.gather(0, torch.stack([room(c) for c in candidates]).argmax(dim=0, keepdim=True))[0]
    least, most = bounds(best)
    addend = (least + most) // 2
    there = least <= most
    if shift == PAIR_SHIFT:
        ends = torch.stack((addend, 255 * best + addend))
        there = there & (ends >= 0).all(0) & (ends < 2**16).all(0) & (best >= 0)
    return torch.stack((best, addend, there.to(torch.int64)))
