"""CCQ's words by integers: the multiply-add that gives a byte's 15-bit word without a conversion or a rounding.

A byte c stands for ``floor(c * code_scale + code_zp + 0.5)`` in fp32 (`kernels.reference.dequantize`). A GPU does
better with ``(c * multiplier + addend) >> shift``. Both are steps of a straight line, so integers that give the same
256 words exist for nearly every pair; they are looked for when a weight is loaded, and compared word by word.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE_SHIFT = 17
"""The word in the upper 15 of 32 bits: 17 bits of fraction, one byte a multiply-add."""
PAIR_SHIFT = 1
"""The word in the upper 15 of 16 bits: two bytes a multiply-add, for pairs that are multiples of one half."""
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8)  # slopes tried around the real one
_COLUMNS = 8192  # columns at a time: 256 int64 words of each are 16 MiB


def words(code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """The words of all bytes: fp32 [N] twice -> int64 [256, N], with the roundings of the reference decoder."""
    codes = torch.arange(256, dtype=torch.float32, device=code_scale.device).unsqueeze(1)
    return torch.floor(codes * code_scale.float() + code_zp.float() + 0.5).to(torch.int64)


def lines(code_scale: Tensor, code_zp: Tensor, *, shift: int) -> tuple[Tensor, Tensor] | None:
    """Integers that give the same words.

    Args:
        code_scale: fp32 [...], slopes.
        code_zp: fp32 [...], intercepts.
        shift: bits of fraction; `PAIR_SHIFT` also demands that every ``c * multiplier + addend`` fit 16 bits unsigned.

    Returns:
        int32 multiplier and addend [...] (modulo 2^32), or None if some pair has none.
    """
    both = torch.stack((code_scale.float(), code_zp.float())).flatten(1)
    pairs, where = torch.unique(both, dim=1, return_inverse=True)
    found = [_fit(*pairs[:, i : i + _COLUMNS], shift=shift) for i in range(0, pairs.shape[1], _COLUMNS)]
    if not all(fit is not None for fit in found):
        return None
    fits = torch.cat([fit for fit in found if fit is not None], dim=1)[:, where]  # [2, ...]
    fits = (fits + 2**31) % 2**32 - 2**31  # the same bits, signed
    multiplier, addend = fits.to(torch.int32).view(2, *code_scale.shape)
    return multiplier.contiguous(), addend.contiguous()


def _fit(scale: Tensor, zero: Tensor, *, shift: int) -> Tensor | None:
    """int64 [2, N]: multiplier and addend of each column; None unless all columns have them.

    For a fixed multiplier the addend must put every ``c * multiplier + addend`` into its word's interval of 2^shift
    integers: 256 lower and upper bounds, so an addend exists if the greatest lower is not over the least upper.
    """
    if not bool(torch.isfinite(scale).all() & torch.isfinite(zero).all()):
        return None
    codes = torch.arange(256, dtype=torch.int64, device=scale.device).unsqueeze(1)
    floors = words(scale, zero) << shift  # [256, N]
    middle = torch.round(scale.double() * 2**shift).to(torch.int64)
    best, slack = torch.zeros(2, *scale.shape, dtype=torch.int64, device=scale.device), torch.full_like(middle, -1)
    for step in _NEIGHBOURS:
        multiplier = middle + step
        rest = floors - codes * multiplier  # [256, N]
        low, high = rest.amax(dim=0), rest.amin(dim=0) + 2**shift - 1
        addend = (low + high) // 2
        room = high - low
        if shift == PAIR_SHIFT:
            ends = torch.stack((addend, 255 * multiplier + addend))
            room = torch.where((ends >= 0).all(0) & (ends < 2**16).all(0) & (multiplier >= 0), room, -1)
        better = room > slack
        best = torch.where(better, torch.stack((multiplier, addend)), best)
        slack = torch.where(better, room, slack)
    return best if bool((slack >= 0).all()) else None
