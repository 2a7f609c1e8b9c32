"""Sampling noise as a pure function of (seed, position, token id).

SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a counter-based
generator: a row's key is mixed from its seed and position, and token ``t`` gets output ``t + 1`` of the SplitMix64
stream that starts at the key. No state is kept, so a token does not depend on which requests share the batch, on the
order of steps, or on the machine; a request continued elsewhere goes on with the text it would have had.

The hash is exact integer arithmetic (int64 with wrap-around): the same bits on every device. The two logarithms that
follow may differ in the last place between a CPU and a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.seeds import GAMMA, MULTIPLY_1, MULTIPLY_2, mix, signed


def row_keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """Start of each row's stream, int64 [rows]: ``mix(mix(seed) + position * gamma)``."""
    keys = [mix(mix(seed) + position * GAMMA) for seed, position in zip(seeds, positions, strict=True)]
    return torch.tensor([signed(key) for key in keys], dtype=torch.int64, device=device)


def hash_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """64 well-mixed bits for each (row, token).

    Args:
        keys: int64 [rows], from :func:`row_keys`.
        token_ids: int64 [tokens], the same for all rows, or [rows, tokens].

    Returns:
        int64 [rows, tokens].
    """
    bits = (token_ids + 1) * signed(GAMMA) + keys.unsqueeze(-1)  # [rows, tokens]
    shifted = torch.empty_like(bits)
    for shift, multiplier in ((30, MULTIPLY_1), (27, MULTIPLY_2), (31, None)):
        # torch shifts int64 arithmetically; the mask makes it the logical shift of the paper.
        torch.bitwise_right_shift(bits, shift, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if multiplier is not None:
            bits.mul_(signed(multiplier))
    return bits


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each (row, token); arguments as for :func:`hash_bits`.

    63 of the bits become ``u`` in (0, 1), and the noise is ``-log(-log(1 - u))``. Large noise, which decides who wins,
    comes from small ``u``, and a float32 keeps 24 significant bits of a small ``u``: the winning tail reaches
    probabilities of 2^-63 without steps, where the usual 24-bit uniform ends at 2^-24.

    Returns:
        float32 [rows, tokens], finite.
    """
    bits = hash_bits(keys, token_ids)
    bits.bitwise_and_((1 << 63) - 1).bitwise_or_(1)  # 1 .. 2^63-1
    uniform = bits.to(torch.float32).mul_(2.0**-63).clamp_(max=1 - 2.0**-24)  # [rows, tokens]
    return uniform.neg_().log1p_().neg_().log_().neg_()
