"""A matrix in integers on evenly spaced grids, and the formats that hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint import paddle_layout
from engine.compress.packed import PackedWeight
from engine.errors import UnsupportedError
from engine.quantization.format import WeightFormat
from engine.quantization.gptq import Gptq, pack_words
from engine.quantization.wint4 import Wint4
from engine.quantization.wint8 import Wint8


def format_of(*, bits: int, group_size: int | None) -> WeightFormat:
    """The integer format of so many bits: ``gptq`` with groups, Paddle's (one scale an output feature) without.

    Raises:
        UnsupportedError: there is none.
    """
    if group_size is not None:
        return Gptq(bits=bits, group_size=group_size)
    if bits not in (4, 8):
        raise UnsupportedError(f"{bits} bits without groups are not supported; supported: 4, 8; or give a group_size")
    return Wint4() if bits == 4 else Wint8()


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix [N, K], ``w = (code - zero) * scale``.

    Attributes:
        codes: int16 [K, N].
        zeros: int32 [groups, N]; all 0 in formats without zero points.
        scales: [groups, N] in the format's dtype; one group in formats without.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def packed(self, *, bits: int, group_size: int | None) -> PackedWeight:
        """In the tensors of ``format_of(bits, group_size)``."""
        k, n = self.codes.shape
        if group_size is not None:
            qzeros = pack_words(self.zeros.T, bits).T.contiguous()
            tensors = {"qweight": pack_words(self.codes, bits), "qzeros": qzeros, "scales": self.scales}
        else:
            encode = paddle_layout.encode_int8 if bits == 8 else paddle_layout.encode_int4
            tensors = {"quant_weight": encode(self.codes.to(torch.int8)), "weight_scale": self.scales[0]}
        return PackedWeight(format_of(bits=bits, group_size=group_size), (n, k), tensors)
