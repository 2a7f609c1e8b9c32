"""Which weights stay packed on a CPU."""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import torch

from kernels import reference
from kernels.cpu.dense import halve
from kernels.cpu.packed import pack
from kernels.cpu.threads import compile_all
from kernels.operands import CcqWeight, DenseWeight, Int4Weight, Int8Weight, Weight
from kernels.prepared import Prepared, dense

logger = logging.getLogger(__name__)

PACKED_WEIGHTS = 1 << 20
"""Fewest weights of a matrix that stays packed: those of a smaller one are in a cache when they are wanted, and torch's
product with them takes less time (benchmarks/cpu_decode.py, "threshold")."""
PACKED_STACK = 1 << 18
"""The same of a whole stack of experts, whose products torch would have to be asked for one by one, after Python has
learned which experts were chosen; so a step with dense experts can't be recorded (`kernels.cpu.tape`)."""


def prepare(weight: Weight, *, dtype: torch.dtype, device: torch.device) -> Prepared:
    """From `PACKED_WEIGHTS` on (of stacks, `PACKED_STACK`), WINT2, INT4 and INT8 stay packed, and what was stored as
    bf16 stays in 16 bits; everything else is decoded to `dtype`."""
    compile_all()  # while loading, rather than in the first step
    if isinstance(weight, CcqWeight | Int4Weight | Int8Weight) and _is_large(weight):
        return pack(weight)
    if isinstance(weight, DenseWeight) and weight.weight.numel() >= PACKED_WEIGHTS and dtype == torch.float32:
        half = halve(weight.weight)
        if half is not None:
            return half
    prepared = reference.prepare(weight, dtype=dtype, device=device)
    if not isinstance(weight, DenseWeight | CcqWeight | Int4Weight | Int8Weight):
        shape = tuple(dense(prepared).weight.shape)
        if math.prod(shape) >= PACKED_WEIGHTS:
            _warn(type(weight).__name__, shape)
    return prepared


def _is_large(weight: CcqWeight | Int4Weight | Int8Weight) -> bool:
    if isinstance(weight, CcqWeight):
        stored, weights_each = weight.codes, 4
    else:
        stored, weights_each = (weight.packed, 2) if isinstance(weight, Int4Weight) else (weight.values, 1)
    return stored.numel() * weights_each >= (PACKED_STACK if stored.dim() == 3 else PACKED_WEIGHTS)


@lru_cache(maxsize=256)
def _warn(kind: str, shape: tuple[int, ...]) -> None:
    """Once for a format and a shape, not for each layer."""
    logger.warning(
        "%s %s: the CPU has no kernel for this format; decoded, it takes the memory of dense weights", kind, list(shape)
    )
