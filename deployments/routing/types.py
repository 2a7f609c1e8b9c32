"""What the router is told and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine, as its configuration describes it. What it can't hold is never sent to it."""

    replica_id: str
    pool: str
    """Replicas of a pool have the same hardware and the same options, so they share what is learned of them."""
    max_model_len: int
    """Tokens in a sequence at most, prompt and output."""
    block_size: int
    """Tokens in a block of the KV cache."""
    total_blocks: int
    max_num_seqs: int
    """Requests that run at once."""
    max_num_batched_tokens: int
    """Tokens computed in a step at most."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request, as far as its cost is concerned."""

    prompt_tokens: int
    """Tokens of the prompt; of a request that another engine has begun, its output so far is among them."""
    max_tokens: int
    """New tokens at most."""
    block_hashes: Mapping[int, Sequence[bytes]] = field(default_factory=dict)
    """For each block size in use (:attr:`deployments.routing.Router.block_sizes`), the hash chain of the prompt's full
    blocks (:func:`engine.scheduling.prefix.extend_hashes`). A size that is left out has nothing cached."""
    priority: int = 0
    """As in :class:`engine.messages.EngineRequest`: lower runs first. Below 0 is admitted however long it will take."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and what is promised of it. Give it back to :meth:`Router.finished` once, in any case."""

    replica_id: str
    pool: str
    predicted_ttft_s: float
    """Seconds until its first token, from the time of choosing."""
    predicted_tpot_s: float
    """Seconds between its later tokens, on average."""
    cached_tokens: int
    """Tokens of its prompt that are expected in the replica's prefix cache."""
    ticket: int
    """Names the reservation."""
