"""Keys and values of one layer in pages, as they are or as int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
"""Of int8 scales. Values are divided by the scale as it is stored, so its rounding costs nothing as long as the largest
quotient still rounds to 127: at most 127 (1 + 2^-11) = 127.06. With bf16, as large, it would reach 127.5 and be cut."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """A layer's cache on one rank.

    A slot is one position of a block: slot s is position ``s % block_size`` of block ``s // block_size``. In an int8
    cache a token's key (and its value) in each kv head has one scale, ``absmax / 127``, and is kept as
    ``round(x / scale)``, ties to even.

    Attributes:
        keys: [blocks, block_size, Hkv, D], in the compute dtype or int8.
        values: likewise.
        key_scales: fp16 [blocks, Hkv, block_size] of int8 keys, else None. The positions of a block stand side by
            side, since a kv head is read over many positions at a time.
        value_scales: likewise.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def quantized(self) -> bool:
        """Whether keys and values are int8."""
        return self.key_scales is not None

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def token_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes a token takes in one layer.

    Keys and values, and with int8 their scales: ``2 Hkv (D itemsize + 2 if int8)``.

    Args:
        num_kv_heads: Hkv of one rank.
        head_dim: D.
        dtype: of the cache, `torch.int8` or the compute dtype.
    """
    scale = SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + scale)
