"""What a request would meet with on each replica, and do to those already there: all replicas at once.

With the learned rates, a replica's decode step of ``N`` requests that read ``X`` tokens of the cache takes ``base =
step + decode * N + context * X`` seconds. A prompt token costs ``prefill`` and, as a step takes
``max_num_batched_tokens - N`` of them at most, its share of a base step. So

* time to first token: everything queued before it and its own prompt at that price, what is left of the step under way,
  and, if seats or blocks are short, the time until enough of the running requests have ended (one ends every ``span /
  N`` seconds, as they stay for ``span`` seconds: Little's law);
* time per token: the base step with this request in it, divided by the share of time that prompts leave, which is taken
  from the past (fading over about one request's time), and the prompts that are queued now, spread over the tokens of
  a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from deployments.routing.rates import Rates
from deployments.routing.types import Replica

Vector = NDArray[np.float64]

MOST_SHARE = 0.95
"""Of the time that prompts can take: some is always left for decoding, for running requests go first."""
LEAST_SPAN_S = 0.05


class Row(IntEnum):
    """Rows of :attr:`Fleet.columns`, a column being a replica."""

    LIMIT = 0
    """Tokens that a sequence may have; 0 if the replica takes no requests."""
    REQUESTS = 1
    """Waiting, running and on their way."""
    PREFILL = 2
    """Seconds for a prompt token."""
    TOKEN = 3
    """The same with its share of the steps that it takes part in."""
    QUEUE = 4
    """Seconds until what is queued is computed, and what is left of the step under way."""
    SEAT_WAIT = 5
    """Seconds until there is a seat."""
    BLOCK_WAIT = 6
    """Seconds until there are blocks for what is queued (negative if they are there), and for each token more: """
    TOKEN_WAIT = 7
    HEAVIER = 8
    """Seconds of a base step with one more request, its context apart, and for each token of that: """
    CONTEXT = 9
    STRETCH = 10
    """How many times a base step the time between tokens is, because of prompts; and by how much each token of a new
    prompt raises that: """
    TOKEN_STRETCH = 11
    TPOT = 12
    """Seconds between tokens as it is."""
    SPAN = 13
    """Seconds that a request decodes."""
    MISSING = 14
    """Of the requests there, how many will probably miss the service level as it is. Left to the router."""


class Fleet:
    """The state of all replicas as float64 [len(Row), capacity]; columns never used are zero."""

    def __init__(self) -> None:
        self.size = 0
        self.columns: Vector = np.zeros((len(Row), 16))

    @property
    def state(self) -> Vector:
        """The columns in use, [len(Row), size]; a view."""
        return self.columns[:, : self.size]

    def open(self) -> int:
        """A new column; returns its index."""
        if self.size == self.columns.shape[1]:
            self.columns = np.concatenate([self.columns, np.zeros_like(self.columns)], axis=1)
        self.size += 1
        return self.size - 1


@dataclass(frozen=True, slots=True)
class Work:
    """What a replica has to do, as far as is known."""

    queued_tokens: float
    """Prompt tokens to compute."""
    requests: float
    context_tokens: float
    """That a decode step of these requests reads."""
    free_blocks: float
    past_share: float
    """Of time, that went into prompts."""
    output_tokens: float
    """Of a request, expected."""


def describe(replica: Replica, rates: Rates, work: Work) -> list[float]:
    """A replica's column, in the order of :class:`Row`."""
    requests = work.requests
    base = rates.step + rates.decode * requests + rates.context * work.context_tokens
    span = max(work.output_tokens * base, LEAST_SPAN_S)
    token = rates.prefill + base / max(replica.max_num_batched_tokens - requests, 1.0)
    depart = span / (requests + 1.0)
    # A departure frees the blocks of one request.
    block_wait = depart * requests / (replica.total_blocks - work.free_blocks + 1.0)
    lacking = work.queued_tokens / replica.block_size - work.free_blocks
    stretch = 1.0 / (1.0 - min(work.past_share, MOST_SHARE)) + work.queued_tokens * rates.prefill / span
    return [
        float(min(replica.max_model_len, replica.total_blocks * replica.block_size)),
        requests,
        rates.prefill,
        token,
        work.queued_tokens * token + 1.5 * base,
        max(requests + 1.0 - replica.max_num_seqs, 0.0) * depart,
        lacking * block_wait,
        block_wait / replica.block_size,
        base + rates.decode,
        rates.context,
        stretch,
        rates.prefill / span,
        base * stretch,
        span,
        0.0,
    ]


@dataclass(frozen=True, slots=True)
class Prediction:
    """For every replica, float64 [size], in seconds."""

    ttft: Vector
    work: Vector
    """Of its prompt alone."""
    tpot: Vector
    others_tpot: Vector
    """What it would become for the requests there, while this one's prompt is computed."""


def predict(state: Vector, *, prompt_tokens: int, cached_tokens: Vector | float) -> Prediction:
    """What a prompt would meet with; ``state`` is [len(Row), size], ``cached_tokens`` of its prompt by replica."""
    (_, _, prefill, token, queue, seat_wait, block_wait, token_wait, heavier, context, stretch, token_stretch, *_) = (
        state
    )
    new = prompt_tokens - cached_tokens
    ttft = new * token
    ttft += queue
    wait = new * token_wait
    wait += block_wait
    ttft += np.maximum(wait, seat_wait, out=wait)
    step = context * prompt_tokens
    step += heavier
    others = new * token_stretch
    others += stretch
    others *= step
    step *= stretch
    return Prediction(ttft=ttft, work=new * prefill, tpot=step, others_tpot=others)
