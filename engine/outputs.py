"""What a client of the engine gets: text with the tokens behind it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability under the model, before any sampling option.

    ``token`` and ``token_bytes`` name it as OpenAI does (:meth:`Tokenizer.token_text`); ``rank`` 1 is the most likely.
    """

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs(Logprob):
    """The token taken at one position, and the most likely ones there (as many as were asked for, best first)."""

    top: tuple[Logprob, ...] = ()

    @classmethod
    def of(cls, raw: TokenLogprobs, tokenizer: Tokenizer) -> PositionLogprobs:
        """Give an engine's log probabilities their token names."""
        top = tuple(
            Logprob(token_id, *tokenizer.token_text(token_id), logprob=logprob, rank=rank)
            for rank, (token_id, logprob) in enumerate(raw.top.items(), start=1)
        )
        token, token_bytes = tokenizer.token_text(raw.token_id)
        return cls(raw.token_id, token, token_bytes, logprob=raw.logprob, rank=raw.rank, top=top)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice.

    Attributes:
        index: which of the ``n`` choices.
        text: generated text, without stop token and (unless asked for) stop string.
        token_ids: all tokens generated, the stop token and those of the stop string among them.
        logprobs: one entry for each token, where asked for.
        cumulative_logprob: sum of the tokens' log probabilities, where asked for.
        finish_reason: "stop" (EOS, a stop token or a stop string) or "length".
        stop_reason: the stop string, or the id out of ``stop_token_ids``, that ended it; None for EOS and "length".
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    cumulative_logprob: float | None
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt with its choices. ``prompt`` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved from being computed (the most of any choice)."""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One entry for each prompt token, where asked for; None for the first, which follows nothing."""
