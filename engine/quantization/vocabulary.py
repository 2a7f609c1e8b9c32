"""Token embedding and logits head in few bits, rounded while they load: checkpoints hold them in bf16.

Of a 300B model in 2 bits they are 3.4 GB, 4 % of all; what a card of 80 GB lacks for a cache.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.compress.grid import Codes, Grid
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.quantization.gptq import pack_words
from kernels.operands import GroupedWeight, Int8Weight

QuantizeEmbeddings = Literal["int8", "int4"]
"""int8: a scale a row. int4: a scale and a zero point for each group of features of a row."""
GROUP_SIZES = (128, 64, 32)
"""Features of a group in int4: the first that divides the hidden size."""
_AT_ONCE = 1 << 24
"""Numbers in flight, several times over in fp32."""


def group_size(hidden_size: int) -> int:
    """Features that share a scale in int4.

    Raises:
        ConfigError: no group fits.
    """
    for size in GROUP_SIZES:
        if hidden_size % size == 0:
            return size
    raise ConfigError(
        f"quantize_embeddings int4 needs a hidden size in multiples of {GROUP_SIZES[-1]}; the model's is {hidden_size}"
    )


def table_bytes(rows: int, hidden_size: int, how: QuantizeEmbeddings | None) -> int:
    """Memory of a table [rows, H] once rounded; None: in bf16."""
    if how is None:
        return 2 * rows * hidden_size
    if how == "int8":
        return rows * (hidden_size + 2)
    groups = hidden_size // group_size(hidden_size)
    return rows * (hidden_size // 2 + groups * 3)  # a scale in fp16, a zero point in a byte


def savings(model: ModelConfig, world_size: int, now: QuantizeEmbeddings | None) -> dict[str, int]:
    """Bytes of a rank's memory that each rounding would save over bf16, the least first; empty if there is one."""
    if now is not None:
        return {}
    rows, tables = -(-model.vocab_size // world_size), 1 if model.tie_word_embeddings else 2
    hidden = model.hidden_size
    whole = table_bytes(rows, hidden, None)
    possible: tuple[QuantizeEmbeddings, ...] = ("int8",) if hidden % GROUP_SIZES[-1] else ("int8", "int4")
    return {how: tables * (whole - table_bytes(rows, hidden, how)) for how in possible}


def round_table(table: Tensor, how: QuantizeEmbeddings) -> Int8Weight | GroupedWeight:
    """A table [rows, H], in any floating dtype, as a matrix of K = H and N = rows.

    Every row is rounded by itself, so it is the same for every tensor-parallel size.

    Raises:
        ConfigError: the hidden size has no groups.
    """
    hidden = table.shape[1]
    pieces = torch.split(table, max(1, _AT_ONCE // hidden))
    if how == "int8":
        rounded = [_int8(piece.float()) for piece in pieces]
        return Int8Weight(*(torch.cat(parts) for parts in zip(*rounded, strict=True)))
    size = group_size(hidden)
    words, zeros, scales = zip(*(_int4(piece.float(), size) for piece in pieces), strict=True)
    return GroupedWeight(torch.cat(words, dim=1), torch.cat(zeros, dim=1), torch.cat(scales, dim=1), bits=4)


def _int8(table: Tensor) -> tuple[Tensor, Tensor]:
    """Values [rows, H] and scales bf16 [rows], from the greatest of each row."""
    scale = (table.abs().amax(dim=1) / 127).bfloat16()
    divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    return (table / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _int4(table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words int32 [H / 8, rows], zero points uint8 and scales fp16 [H / size, rows], of least squared error."""
    rows, hidden = table.shape
    values = table.view(rows * hidden // size, size).t()  # [size, rows * groups]
    grid = Grid.clipping(Codes.asymmetric(4), values, torch.ones(size, device=table.device))
    codes = grid.codes(values).t().reshape(rows, hidden).t()  # [H, rows]

    def of_groups(per_group: Tensor, dtype: torch.dtype) -> Tensor:
        return per_group.view(rows, hidden // size).t().to(dtype).contiguous()

    return pack_words(codes, 4), of_groups(grid.zeros, torch.uint8), of_groups(grid.scales, torch.float16)
