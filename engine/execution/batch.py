"""One step's flat batch: what every rank needs to know to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.scheduling.part import ScheduledRequest

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInput:
    """T tokens of R requests, request after request.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T], each token's index in its sequence.
        slot_mapping: int64 [T], ``block_id * block_size + offset`` of each token's keys and values.
        block_tables: int32 [R, max_blocks], padded with 0.
        query_start: int32 [R + 1], rows ``query_start[r] : query_start[r + 1]`` are request r's.
        context_lens: int32 [R], tokens of the sequence up to and with this step's.
        logits_rows: int32 [S], the rows of T whose logits are wanted.
    """

    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int64Array
    block_tables: Int32Array
    query_start: Int32Array
    context_lens: Int32Array
    logits_rows: Int32Array


def build_step_input(scheduled: Sequence[ScheduledRequest], block_size: int) -> StepInput:
    """Lay the parts of a step one after the other.

    Logits are wanted of the last token of each part that samples, and of the first ``num_prompt_rows`` of each; they
    are in the order of the tokens (:func:`sampled_rows` tells which are which).

    Args:
        scheduled: at least one part, each of at least one token, with blocks allotted for all of it.
        block_size: tokens in a block.
    """
    starts = np.array([part.start for part in scheduled], dtype=np.int64)  # [R]
    counts = np.array([part.num_new_tokens for part in scheduled], dtype=np.int64)
    ends = starts + counts
    num_blocks = (-(-ends // block_size)).tolist()
    token_ids: list[int] = []
    block_tables = np.zeros((len(scheduled), max(num_blocks)), dtype=np.int32)
    for r, part in enumerate(scheduled):
        token_ids += part.request.all_token_ids[part.start : part.start + part.num_new_tokens]
        block_tables[r, : num_blocks[r]] = part.request.block_table[: num_blocks[r]]
    query_start = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    owners = np.repeat(np.arange(len(scheduled)), counts)  # [T], the request of each row
    positions = np.arange(len(token_ids)) + (starts - query_start[:-1])[owners]
    slots = block_tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    samples = np.fromiter((part.samples for part in scheduled), dtype=np.bool_, count=len(scheduled))
    logits_rows = (query_start[1:] - 1)[samples]
    prompt_rows = [
        np.arange(first, first + part.num_prompt_rows, dtype=np.int32)
        for first, part in zip(query_start.tolist(), scheduled, strict=False)
        if part.num_prompt_rows
    ]
    if prompt_rows:
        logits_rows = np.sort(np.concatenate([logits_rows, *prompt_rows]))
    return StepInput(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=slots,
        block_tables=block_tables,
        query_start=query_start,
        context_lens=ends.astype(np.int32),
        logits_rows=logits_rows,
    )


def sampled_rows(scheduled: Sequence[ScheduledRequest]) -> tuple[list[int], list[range]]:
    """Which rows of a step's logits are for sampling, and which are for log probabilities of each part's prompt."""
    samples: list[int] = []
    prompts: list[range] = []
    row = 0
    for part in scheduled:
        prompts.append(range(row, row + part.num_prompt_rows))
        row += part.num_prompt_rows
        if part.samples:
            samples.append(row)
            row += 1
    return samples, prompts


def dummy_step(num_tokens: int, num_seqs: int, block_size: int) -> StepInput:
    """The largest step an engine may take, to find how much memory one needs: tokens spread over all sequences.

    Uses blocks 0 ... R * max_blocks - 1, and wants logits of the last token of each sequence.
    """
    num_seqs = min(num_seqs, num_tokens)
    counts = np.full(num_seqs, num_tokens // num_seqs) + (np.arange(num_seqs) < num_tokens % num_seqs)  # [R]
    return nobodys_step(counts, block_size=block_size)


def nobodys_step(
    counts: npt.ArrayLike,
    *,
    past: npt.ArrayLike = 0,
    block_size: int,
    num_blocks: int | None = None,
    num_rows: int | None = None,
) -> StepInput:
    """Tokens of no request, over a cache in which nothing is kept yet.

    Args:
        counts: tokens of each of R sequences, at least one.
        past: tokens before them, of each or the same of all.
        block_size: tokens in a block.
        num_blocks: of the cache; if the sequences need more, they share some, which no kernel minds. None for enough.
        num_rows: the last so many rows have logits; None for the last of each sequence.
    """
    counts = np.asarray(counts, dtype=np.int64)  # [R]
    context_lens = counts + np.asarray(past, dtype=np.int64)
    num_tokens, max_blocks = int(counts.sum()), -(-int(context_lens.max()) // block_size)
    query_start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    block_tables = np.arange(len(counts) * max_blocks, dtype=np.int32).reshape(len(counts), max_blocks)
    if num_blocks is not None:
        block_tables %= num_blocks
    owners = np.repeat(np.arange(len(counts)), counts)  # [T]
    positions = np.arange(num_tokens) + (context_lens - query_start[1:])[owners]
    slots = block_tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    last = query_start[1:] - 1
    return StepInput(
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=slots,
        block_tables=block_tables,
        query_start=query_start,
        context_lens=context_lens.astype(np.int32),
        logits_rows=last if num_rows is None else np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32),
    )
