"""A request on its way through one engine or several: what its client has received, and what is asked of the next."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from deployments.config import FailoverConfig
from deployments.routing import Job
from engine.errors import EngineDeadError
from engine.messages import EngineRequest, TokenDelta
from engine.scheduling.prefix import extend_hashes


class PromptHashes:
    """Hashes of the blocks of the prompt last asked for.

    Of one alone: the choices of an HTTP request come one after the other and have the same prompt. While a long one is
    hashed for each of them, no stream of others would go on.
    """

    def __init__(self) -> None:
        self._prompt: list[int] | None = None
        self._hashes: dict[int, list[bytes]] = {}  # by block size

    def of(self, prompt: list[int], block_size: int) -> list[bytes]:
        """One for each full block; the list is shared, and not to be changed."""
        if prompt is not self._prompt:
            self._prompt, self._hashes = prompt, {}
        if block_size not in self._hashes:
            extend_hashes(self._hashes.setdefault(block_size, []), prompt, block_size)
        return self._hashes[block_size]


@dataclass(slots=True)
class Continuation:
    """One request, and its tokens so far.

    Sampling is a function of (seed, position, tokens so far), so an engine that is given the tokens received goes on as
    the one before would have.
    """

    request: EngineRequest
    prompts: PromptHashes = field(default_factory=PromptHashes)
    """Shared by the requests of a client."""
    started: float = field(default_factory=time.monotonic)
    received: list[int] = field(default_factory=list)
    """All output tokens known, those that came with the request included."""
    attempts: int = 0
    first_token_at: float | None = None
    _hashes: dict[int, list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.received = list(self.request.output_token_ids)

    @property
    def begun(self) -> bool:
        """Whether some engine has had it."""
        return self.attempts > 0

    def job(self, block_sizes: Collection[int], *, admitted: bool) -> Job:
        """The request for the router; one that was admitted before isn't turned away now."""
        prompt = self.request.prompt_token_ids
        whole = [*prompt, *self.received] if self.received else prompt
        for size in block_sizes:
            if size not in self._hashes:
                self._hashes[size] = self.prompts.of(prompt, size)
            if self.received:
                self._hashes[size] = list(self._hashes[size])
                extend_hashes(self._hashes[size], whole, size)
        return Job(
            prompt_tokens=len(whole),
            max_tokens=max(self.request.max_tokens - len(self.received), 1),
            block_hashes=self._hashes,
            priority=min(self.request.priority, -1) if admitted else self.request.priority,
        )

    def next_attempt(self) -> EngineRequest:
        """The request for the next engine.

        A later attempt has an id of its own: the engine may be the same one, whose stream was lost, and still have the
        one before.
        """
        self.attempts += 1
        if self.attempts == 1:
            return self.request
        return replace(
            self.request,
            request_id=f"{self.request.request_id}~{self.attempts}",
            output_token_ids=list(self.received),
        )

    def accept(self, delta: TokenDelta) -> TokenDelta:
        """Note an engine's tokens; the delta as the client should see it."""
        is_first = self.first_token_at is None
        if is_first and delta.token_ids:
            self.first_token_at = time.monotonic()
        self.received += delta.token_ids
        if self.attempts == 1:
            return delta
        return replace(
            delta,
            request_id=self.request.request_id,
            num_cached_tokens=delta.num_cached_tokens if is_first else 0,
            prompt_logprobs=delta.prompt_logprobs if is_first else None,
            queued_seconds=delta.queued_seconds if is_first else 0.0,
        )


class Suspicion:
    """Counts the engines that one request loses: a request that itself brings them down must not take them all.

    A request that had new tokens from an engine is hardly what broke it, so what counts most is losses without any.
    """

    def __init__(self, config: FailoverConfig) -> None:
        self._config = config
        self._in_all = 0
        self._in_a_row = 0

    def engine_lost(self, failure: EngineDeadError, *, progressed: bool) -> None:
        """Count a loss.

        Args:
            failure: what became of the engine.
            progressed: whether it had given the request new tokens.

        Raises:
            EngineDeadError: it was one too many.
        """
        self._in_all += 1
        self._in_a_row = 1 if progressed else self._in_a_row + 1
        if self._in_a_row > self._config.max_losses or self._in_all > self._config.max_losses_in_all:
            raise EngineDeadError(
                f"{self._in_all} engine(s) were lost one after another while they worked on this request, so it is "
                f"given up: it may be what brings them down. The last: {failure}"
            )
