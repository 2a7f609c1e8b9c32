"""Boxes in which tokens wait for their readers, and the items in which they travel from one to the other.

Everything here lives on one event loop and takes no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

import msgspec

from engine.errors import EngineDeadError
from engine.messages import EngineLoad, TokenDelta

LOAD_INTERVAL_S = 0.05
"""An ingress without tokens in a step hears of the engine's load at most this often."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`RequestError` on the wire."""

    message: str
    field: str | None
    code: str | None


class Item(msgspec.Struct, frozen=True, array_like=True):
    """What one ingress is told at once: its new tokens, its refused requests, the engine's load after the last step.

    ``cached`` and ``evicted`` are the hashes of blocks that can be found, or can't any more, since the item before. In
    the first item of a stream ``cached`` has all that can be found.
    """

    deltas: list[TokenDelta]
    refused: dict[str, Refusal]
    load: EngineLoad
    cached: list[bytes]
    evicted: list[bytes]


encode_item = msgspec.msgpack.Encoder().encode
decode_item = msgspec.msgpack.Decoder(Item).decode


def merge(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    """Two deltas of one request, in the order in which they came, as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *(second.logprobs or [])]
    return TokenDelta(
        request_id=first.request_id,
        token_ids=[*first.token_ids, *second.token_ids],
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        logprobs=logprobs,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
        queued_seconds=max(first.queued_seconds, second.queued_seconds),
    )


class Outbox:
    """What one ingress has not read yet."""

    def __init__(self, load: EngineLoad, cached: Iterable[bytes] = ()) -> None:
        self.request_ids: set[str] = set()
        self._deltas: dict[str, TokenDelta] = {}
        self._refused: dict[str, Refusal] = {}
        self._blocks: dict[bytes, bool] = dict.fromkeys(cached, True)  # by hash, whether it can be found now
        self._load = load
        self._ready = asyncio.Event()
        self._ready.set()  # the first item says hello, with the load
        self._sent_at = 0.0
        self._reminder: asyncio.TimerHandle | None = None
        self._closed = False
        self._failure: EngineDeadError | None = None

    def put(self, delta: TokenDelta) -> None:
        """Add one request's tokens; :meth:`flush` follows once a step."""
        waiting = self._deltas.get(delta.request_id)
        self._deltas[delta.request_id] = delta if waiting is None else merge(waiting, delta)

    def refuse(self, request_id: str, refusal: Refusal) -> None:
        """Add a request that can't be served."""
        self._refused[request_id] = refusal

    def note_blocks(self, cached: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Add a step's changes of the prefix cache."""
        for findable, hashes in ((True, cached), (False, evicted)):
            for block_hash in hashes:
                # A hash goes back and forth between two states, so a second change undoes the first.
                if self._blocks.pop(block_hash, None) is None:
                    self._blocks[block_hash] = findable

    def flush(self, load: EngineLoad) -> None:
        """End a step: wake the reader if there is something to say."""
        self._load = load
        silence = time.monotonic() - self._sent_at
        if self._deltas or self._refused or silence >= LOAD_INTERVAL_S:
            self._ready.set()
        elif self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(LOAD_INTERVAL_S - silence, self._remind)

    def close(self, failure: EngineDeadError | None = None) -> None:
        """End the stream, with ``failure`` as the reader's error if given."""
        self._closed = True
        self._failure = failure
        self._ready.set()
        if self._reminder is not None:
            self._reminder.cancel()

    def _remind(self) -> None:
        self._reminder = None
        self._ready.set()

    async def items(self) -> AsyncGenerator[bytes, None]:
        """Encoded items until :meth:`close`; all that gathered since the one before is in one.

        Raises:
            EngineDeadError: the engine failed; what it had finished before was yielded.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            closed = self._closed  # if that comes while an item is with the reader, there may be another item before it
            if self._deltas or self._refused or not closed:
                deltas, self._deltas = self._deltas, {}
                refused, self._refused = self._refused, {}
                blocks, self._blocks = self._blocks, {}
                cached = [block_hash for block_hash, findable in blocks.items() if findable]
                evicted = [block_hash for block_hash, findable in blocks.items() if not findable]
                self._sent_at = time.monotonic()
                yield encode_item(Item(list(deltas.values()), refused, self._load, cached, evicted))
            if closed:
                if self._failure is not None:
                    raise self._failure
                return


class Inbox:
    """Tokens of one request that its handler has not taken yet."""

    def __init__(self) -> None:
        self._delta: TokenDelta | None = None
        self._failure: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        """Add new tokens; they join those that wait."""
        self._delta = delta if self._delta is None else merge(self._delta, delta)
        self._ready.set()

    def fail(self, failure: Exception) -> None:
        """End with an error, after the tokens that wait."""
        self._failure = failure
        self._ready.set()

    async def get(self) -> TokenDelta:
        """All tokens since the last call, waiting for the first.

        Raises:
            RequestError: the engine refused the request.
            EngineDeadError: the engine is gone.
        """
        await self._ready.wait()
        delta, self._delta = self._delta, None
        if delta is None:
            if self._failure is None:
                raise RuntimeError("an inbox was woken without tokens and without an error")
            raise self._failure
        if self._failure is None:
            self._ready.clear()
        return delta
