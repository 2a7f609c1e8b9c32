"""Log probabilities in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.outputs import Logprob, PositionLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON can't say; OpenAI uses the same number."""


def chat_logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""
    content = [{**_entry(position), "top_logprobs": list(map(_entry, position.top))} for position in positions]
    return {"content": content, "refusal": None}


def completion_logprobs(positions: Sequence[PositionLogprobs], *, text_offset: int) -> dict[str, Any]:
    """``logprobs`` of a completion choice; ``text_offset`` is where its first token starts in the choice's text."""
    offsets = []
    for position in positions:
        offsets.append(text_offset)
        text_offset += num_characters(position)
    return {
        "tokens": [position.token for position in positions],
        "token_logprobs": [_finite(position.logprob) for position in positions],
        # The token taken is always listed, one beyond those asked for where it isn't among the likeliest.
        "top_logprobs": [
            {entry.token: _finite(entry.logprob) for entry in (*position.top, position)} for position in positions
        ],
        "text_offset": offsets,
    }


def num_characters(entry: Logprob) -> int:
    """How many characters begin in a token: a character spread over several tokens counts at its first byte."""
    return sum(byte & 0xC0 != 0x80 for byte in entry.token_bytes)


def _entry(entry: Logprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.token_bytes)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
