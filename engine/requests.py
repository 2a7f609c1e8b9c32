"""From a prompt and sampling parameters to engine requests: the one place where bounds and seeds are settled.

Used by the offline :class:`engine.llm.LLM` and by every HTTP endpoint, so that both refuse the same things.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from engine.errors import RequestError
from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.seeds import choice_seed


def expand(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_model_len: int,
    request_id: str,
    used_vocab_size: int | None = None,
) -> list[EngineRequest]:
    """Make one engine request for each of ``params.n`` choices.

    ``max_tokens`` is bounded by what the prompt leaves of ``max_model_len``. A missing seed is drawn here, so that a
    request can be continued on another engine; choice i takes :func:`engine.seeds.choice_seed`. Request ids are
    ``request_id`` for one choice and ``request_id-0``, ``request_id-1``, … for several.

    Args:
        used_vocab_size: ids that have a token; where given, ids of the prompt and of ``logit_bias`` are checked.

    Raises:
        RequestError: with ``field`` "prompt" (empty, ids that don't exist; code "context_length_exceeded" where it
            doesn't leave room for one token), "min_tokens" or "logit_bias".
    """
    prompt = list(prompt_token_ids)
    if not prompt:
        raise RequestError("the prompt has no tokens; at least one is needed", field="prompt")
    room = max_model_len - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, and the model's context holds {max_model_len} including at least "
            "one new token; shorten the prompt",
            field="prompt",
            code="context_length_exceeded",
        )
    if used_vocab_size is not None:
        _check_ids(prompt, params, used_vocab_size)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but at most {max_tokens} tokens can be generated "
            f"(max_tokens {params.max_tokens}, {len(prompt)} prompt tokens, context {max_model_len})",
            field="min_tokens",
        )
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return [
        EngineRequest(
            request_id=request_id if params.n == 1 else f"{request_id}-{choice}",
            prompt_token_ids=prompt,
            params=params.model_copy(update={"n": 1, "seed": choice_seed(seed, choice)}),
            max_tokens=max_tokens,
        )
        for choice in range(params.n)
    ]


def _check_ids(prompt: list[int], params: SamplingParams, used_vocab_size: int) -> None:
    if min(prompt) < 0 or max(prompt) >= used_vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < used_vocab_size)
        raise RequestError(
            f"the prompt holds token id {wrong}; the model's ids are 0 to {used_vocab_size - 1}", field="prompt"
        )
    for token in params.logit_bias:
        if not 0 <= token < used_vocab_size:
            raise RequestError(
                f"logit_bias names token id {token}; the model's ids are 0 to {used_vocab_size - 1}",
                field="logit_bias",
            )
