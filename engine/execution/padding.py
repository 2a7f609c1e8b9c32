"""Decode steps in one of a few sizes, at addresses that never change: what a captured graph needs.

Padding rows are all the same token, at position 0 of a sequence of one, whose keys and values go to a block that no
request owns. So they go to the same few experts, and read next to no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.execution.batch import StepInput

ROWS = ("token_ids", "positions", "context_lens")
"""The int32 arrays of `StepInput` with one entry for each request of a decode step."""
ALIGNMENT = 4
"""Int32 in 16 bytes: Triton compiles a kernel once more for addresses that are not multiples of 16."""


def is_decode(step: StepInput) -> bool:
    """Whether every request has one token."""
    return len(step.token_ids) == len(step.context_lens)


def choose_size(count: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the ascending `sizes` with room for `count` requests; None if there is none."""
    return next((size for size in sizes if size >= count), None)


def pad(step: StepInput, size: int, *, block: int, block_size: int) -> StepInput:
    """A decode step of R requests as one of `size`.

    Args:
        step: one token a request.
        size: at least R.
        block: one that no request owns; rows R ... size - 1 write into its first slot, and read it.
        block_size: tokens in a block.

    Returns:
        The first R rows as they are, and ``logits_rows`` of them only.
    """
    count = len(step.token_ids)
    if count == size:
        return step
    extra = size - count
    tables = np.zeros((size, step.block_tables.shape[1]), dtype=np.int32)
    tables[:count] = step.block_tables
    tables[count:, 0] = block
    return replace(
        step,
        token_ids=np.pad(step.token_ids, (0, extra)),
        positions=np.pad(step.positions, (0, extra)),
        slot_mapping=np.pad(step.slot_mapping, (0, extra), constant_values=block * block_size),
        block_tables=tables,
        query_start=np.arange(size + 1, dtype=np.int32),
        context_lens=np.pad(step.context_lens, (0, extra), constant_values=1),
    )


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Views of `DecodeBuffers` for n requests of one token; the fields are those of `StepInput`, on the device."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor


class DecodeBuffers:
    """Tensors on the device that every decode step is copied into, with a pinned copy on the host of a GPU.

    They start as padding everywhere.

    Args:
        max_size: requests.
        max_blocks: blocks of the longest sequence.
        block: see `pad`.
        block_size: tokens in a block.
        device: compute device.
    """

    def __init__(self, max_size: int, max_blocks: int, *, block: int, block_size: int, device: torch.device) -> None:
        room = -(-max_size // ALIGNMENT) * ALIGNMENT
        self._rows = torch.zeros((len(ROWS), room), dtype=torch.int32, device=device)
        self._rows[ROWS.index("context_lens")] = 1
        self._slots = torch.full((max_size,), block * block_size, dtype=torch.int64, device=device)
        self._tables = torch.zeros((max_size, max_blocks), dtype=torch.int32, device=device)
        self._tables[:, 0] = block
        self._query_start = torch.arange(max_size + 1, dtype=torch.int32, device=device)
        self._host = tuple(_on_host(tensor) for tensor in (self._rows, self._slots, self._tables))
        self._copied = _event() if device.type == "cuda" else None

    def view(self, size: int) -> DecodeBatch:
        """The first `size` rows."""
        rows = dict(zip(ROWS, self._rows[:, :size].unbind(0), strict=True))
        return DecodeBatch(
            slot_mapping=self._slots[:size],
            block_tables=self._tables[:size],
            query_start=self._query_start[: size + 1],
            **rows,
        )

    def load(self, step: StepInput) -> None:
        """Copy a decode step into the first rows. Blocks that lie behind a context keep what they had."""
        count, width = step.block_tables.shape
        rows, slots, tables = self._host
        if self._copied is not None:
            # A rank that samples nothing may be a step ahead of its GPU, which then still reads these.
            self._copied.synchronize()
        for i, name in enumerate(ROWS):
            rows[i, :count] = torch.from_numpy(getattr(step, name))
        slots[:count] = torch.from_numpy(step.slot_mapping)
        tables[:count, :width] = torch.from_numpy(step.block_tables)
        if self._copied is not None:
            self._rows.copy_(rows, non_blocking=True)
            self._slots[:count].copy_(slots[:count], non_blocking=True)
            self._tables[:count].copy_(tables[:count], non_blocking=True)
            self._copied.record()


def _on_host(tensor: Tensor) -> Tensor:
    """A pinned copy of a GPU's tensor; a CPU's tensor itself."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu().pin_memory()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
