"""Which sizes of steps are launched as other specialisations of kernels, each of which takes seconds to compile.

A launch depends on the number of tokens through the shapes of programs (`kernels.gpu.shapes`), through how pairs of
tokens and experts are sorted (`kernels.gpu.routing`), and through whether K is cut into parts, whose sums are then
fp32: with a given shape, more tokens never mean more parts, so the first and the last number of tokens with that shape
have seen both ways. Integers that change from step to step are not specialised (``do_not_specialize``). Attention
depends on the number of tokens no further than whether a request has few or many, and on the length of a context by
the parts that decoding cuts it into (`kernels.gpu.attention`).

Nothing here depends on the GPU or on a weight, so all ranks find the same sizes, and they are enough for all formats.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernels.gpu.attention import MAX_SPLITS, MIN_ROWS, MIN_SPLIT_KEYS
from kernels.gpu.routing import sorted_at_once
from kernels.gpu.shapes import FEW, SHAPES, expert_rows

ROWS = tuple(shape.rows for shape in FEW + SHAPES)
MANY_QUERIES = MIN_ROWS + 1
"""Queries of a request that are too many for decoding, however few heads are in a group."""


def token_counts(most: int, *, top_k: int = 0, experts: int = 0) -> tuple[int, ...]:
    """Numbers of tokens, ascending, that launch together what any number from 1 to `most` does.

    They serve for the rows of logits too.

    Args:
        most: tokens of a step.
        top_k: experts a token, if the model has any.
        experts: of a layer.
    """
    return tuple(sorted(set(_ends(most, top_k, experts))))


def context_lens(most: int) -> tuple[int, ...]:
    """Lengths of a context, ascending, that launch together what any length from 1 to `most` does when decoding.

    For a single request, whose context is cut into no fewer parts than one of many.
    """
    powers = (MIN_SPLIT_KEYS * 2**i for i in range(1, MAX_SPLITS.bit_length()))
    return (*(length for length in powers if length < most), most)


def _ends(most: int, top_k: int, experts: int) -> Iterator[int]:
    """The first and the last of each run of numbers that share all but the parts of K."""
    before = None
    for tokens in range(1, most + 1):
        key: tuple[int | None, ...] = (_rows(tokens),)
        if experts:
            rows = _rows(expert_rows(tokens, top_k=top_k, experts=experts))
            key = (*key, rows, sorted_at_once(tokens * top_k))
        if key != before:
            yield tokens
            yield max(1, tokens - 1)
        before = key
    yield most


def _rows(count: int) -> int:
    """Of the smallest shape with room for `count`, if a weight may have all shapes; some have fewer."""
    return next((rows for rows in ROWS if count <= rows), ROWS[-1])
