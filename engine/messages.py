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
    output_token_ids: list[int] = field(default_factory=list)
    """Tokens that another engine has generated for it already. They count as output (for ``max_tokens``,
    ``min_tokens``, penalties, a grammar), and the first new token is the one that the other engine would have chosen
    next."""
    priority: int = 0
    """Requests of a lower number run first; equal ones in the order of their arrival."""


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
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first new tokens of a request that asks for them: an entry for each prompt token, None for the first."""
    queued_seconds: float = 0.0
    """With the first new tokens: how long the request waited in the engine until it was first scheduled."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is as of its last step.

    The totals count from the engine's start, so the difference of two loads tells of all steps between them, however
    many there were.
    """

    waiting_requests: int
    running_requests: int
    waiting_prefill_tokens: int
    free_blocks: int
    """Blocks that no request holds; those that hold a cached prefix are among them."""
    total_blocks: int
    steps: int
    """Total of steps."""
    step_seconds: float
    """How long the last step took."""
    busy_seconds: float = 0.0
    """Total time of all steps."""
    prefill_tokens: int = 0
    """Total of prompt tokens computed (recomputed ones after a preemption among them)."""
    decode_tokens: int = 0
    """Total of tokens sampled."""
    context_tokens: int = 0
    """Total over steps and requests of the tokens in the KV cache that the step's attention read."""
    queried_tokens: int = 0
    """Total of prompt tokens that were looked up in the prefix cache."""
    cached_tokens: int = 0
    """Total of those that were found there."""
    preemptions: int = 0
    """Total of preemptions."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step produced. An idle engine sends one without deltas now and then, as a sign of life."""

    deltas: list[TokenDelta]
    load: EngineLoad
    cached: list[bytes] = field(default_factory=list)
    """Hashes of blocks (:mod:`engine.scheduling.prefix`) that have become findable in this step."""
    evicted: list[bytes] = field(default_factory=list)
    """Hashes of blocks that can't be found any more."""
    refused: dict[str, RequestError] = field(default_factory=dict)
    """Requests submitted since the step before that can't be served, by id; nothing else will be heard of them."""
