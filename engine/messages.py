"""What goes into an engine and what comes out of it, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words (``abort`` never reaches a client)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate (``n`` choices are ``n`` of these), already validated.

    ``params.seed`` is set: whoever makes the request draws it, so that the request can be continued elsewhere.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """New tokens at most: ``params.max_tokens`` bounded by what is left of the context."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the token taken, and the most likely ones (id -> logprob, best first)."""

    token_id: int
    logprob: float
    rank: int
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The new tokens of one request in one step.

    A stop token (EOS or one of ``stop_token_ids``) is included in ``token_ids`` as the last one and named in
    ``stop_token_id``; it does not belong to the text.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is as of its last step."""

    waiting_requests: int
    running_requests: int
    waiting_prefill_tokens: int
    free_blocks: int
    total_blocks: int
    steps: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step produced. An idle engine sends one without deltas now and then, as a sign of life."""

    deltas: list[TokenDelta]
    load: EngineLoad
    refused: dict[str, RequestError] = field(default_factory=dict)
    """Requests submitted since the step before that can't be served, by id; nothing else will be heard of them."""
