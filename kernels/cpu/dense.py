"""Dense weights that were stored as bf16, kept in 16 bits for products in fp32.

Nothing is rounded: a bf16 is the upper half of an fp32. A step with few tokens takes the time of reading its weights,
so half the bytes are half the time; the embedding's table, which is most models' head too, is the largest of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.layout import HALF_PANEL, TILE
from kernels.cpu.memory import bytes_for
from kernels.cpu.threads import Stage, run

COMPILED_TOKENS = 16
"""Tokens up to which the compiled kernel takes less time than widening a part and torch's product with it."""
PART_BYTES = 2 << 20
"""Widened weights at a time; they stay in a cache until they are multiplied."""


@dataclass(frozen=True, slots=True)
class HalfPrepared:
    """One matrix.

    Attributes:
        weight: bf16 [N, K], contiguous, K a multiple of HALF_PANEL.
    """

    weight: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return 2 * self.weight.numel()


def halve(weight: Tensor) -> HalfPrepared | None:
    """[N, K] in 16 bits, or None if that would lose something, or the kernel can't take it."""
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.shape[1] % HALF_PANEL:
        return None
    half = bytes_for(weight.shape[0], 2 * weight.shape[1]).view(torch.bfloat16).copy_(weight)
    parts = [slice(first, first + 1024) for first in range(0, len(weight), 1024)]
    same = all(torch.equal(half[part].float(), weight[part]) for part in parts)
    return HalfPrepared(half) if same else None


def multiply(x: Tensor, weight: HalfPrepared) -> Tensor:
    """fp32 [T, K] -> fp32 [T, N]."""
    tokens, n = x.shape[0], weight.out_features
    out = torch.empty(tokens, n)
    if tokens > COMPILED_TOKENS:
        rows = max(1, PART_BYTES // (4 * weight.in_features))
        for first in range(0, n, rows):
            part = weight.weight[first : first + rows]
            out[:, first : first + len(part)] = torch.mm(x, part.float().t())
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    tasks = -(-n // TILE)
    arguments = (
        *(tasks, n, weight.in_features, weight.weight.data_ptr()),
        *(tokens, x.data_ptr(), 4 * x.stride(0), out.data_ptr()),
    )
    run(Stage("halves", arguments, tasks=tasks, num_bytes=weight.num_bytes))
    return out
