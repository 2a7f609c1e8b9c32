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


def with_prompt(
    first: Logprob, prompt: Sequence[PositionLogprobs | None], completion: dict[str, Any], *, text_offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completion choice that begins with its prompt.

    Args:
        first: the prompt's first token, before which there is nothing that could give it a probability.
        prompt: of every prompt token; None for the first.
        completion: of the new tokens, by :func:`completion_logprobs`.
        text_offset: where the prompt's second token starts.
    """
    known = completion_logprobs([position for position in prompt if position is not None], text_offset=text_offset)
    return {
        "tokens": [first.token, *known["tokens"], *completion["tokens"]],
        "token_logprobs": [None, *known["token_logprobs"], *completion["token_logprobs"]],
        "top_logprobs": [None, *known["top_logprobs"], *completion["top_logprobs"]],
        "text_offset": [0, *known["text_offset"], *completion["text_offset"]],
    }


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` in vLLM's shape: by token id, None for the first token."""
    return [
        None
        if position is None
        else {
            str(entry.token_id): {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.token}
            for entry in (*position.top, position)
        }
        for position in positions
    ]


def num_characters(entry: Logprob) -> int:
    """How many characters begin in a token: a character spread over several tokens counts at its first byte."""
    return sum(byte & 0xC0 != 0x80 for byte in entry.token_bytes)


def _entry(entry: Logprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.token_bytes)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
